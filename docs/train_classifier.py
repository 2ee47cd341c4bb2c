"""Train the classifier whose features the Frechet distance compares: eight
epochs, four minutes on two cores.

The weights that everyone measures with lie in the package. This command made
them:

    python docs/train_classifier.py --out scratchgen/evaluate/classifier.npz
"""

import math
import time
from pathlib import Path

from scratchgen import tree  # before NumPy, whose threads it sets up
from scratchgen.data import load_fashion_mnist, minibatches, scale
from scratchgen.evaluate.classifier import WEIGHTS, features, logits
from scratchgen.layers import init_conv, init_dense
from scratchgen.machinery import checkpoint, cli, files
from scratchgen.machinery.parallel import in_parallel, ranks_for, sharded
from scratchgen.machinery.run import check_finite, rng_for
from scratchgen.ops import mean
from scratchgen.optim import adam_step, cosine_decay, flush_denormals, init_moments

import autograd.numpy as np
from autograd.tracer import getval
from tqdm import tqdm

EPOCHS, BATCH, SHARD, LR = 8, 128, 64, 2e-3


def init_classifier(rng):
    return {
        "conv14": [init_conv(rng, 4, 32), init_conv(rng, 32, 32)],
        "down": init_dense(rng, 4 * 32, 64),
        "conv7": [init_conv(rng, 64, 64), init_conv(rng, 64, 32)],
        "features": init_dense(rng, 7 * 7 * 32, 64),
        "classes": init_dense(rng, 64, 10, gain=1.0),
    }


def cross_entropy(params, batch):
    """-log p(label | x) in nats, as a mean over the batch: (N, H, W, 1), (N,) integers -> scalar."""
    x, labels = batch
    scores = logits(params, features(params, x))
    scores = scores - getval(scores).max(axis=1, keepdims=True)  # changes no difference, and exp cannot overflow
    log_p = scores - np.log(np.sum(np.exp(scores), axis=1, keepdims=True))
    return -mean(log_p[np.arange(len(labels)), labels]), {}


def main(argv=None):
    parser = cli.OneLineParser("docs/train_classifier.py", __doc__)
    cli.add_data_flags(parser)
    parser.flag("--seed", "decides every random number", type=cli.number(int, 0), default=0)
    help = f"where the weights go; distances are measured with those in {WEIGHTS}"
    parser.flag("--out", help, type=Path, default=Path("runs/classifier.npz"), metavar="FILE")
    args = parser.parse_args(argv)
    if args.out.is_dir():
        parser.error(f"--out {args.out} is a folder")
    files.check_output(args.out)
    data, ranks = load_fashion_mnist(args.data), ranks_for(args.workers)
    images, labels = data["train_images"], data["train_labels"]
    x_test, labels_test = scale(data["test_images"], 0, 1), data["test_labels"]

    params = init_classifier(rng_for(args.seed, 0))
    params, moments = ranks.share((params, init_moments(params)))
    value_and_grad = sharded(cross_entropy, ranks, params, SHARD, BATCH)
    logits_of = in_parallel(lambda x: logits(params, features(params, x)), SHARD, ranks)
    total_steps, step, began = EPOCHS * math.ceil(len(images) / BATCH), 0, time.monotonic()
    with ranks, cli.progress(total_steps, None, " steps") as bar:
        for epoch in range(EPOCHS):
            for rows in minibatches(np.arange(len(images)), BATCH, rng_for(args.seed, 1, epoch)):
                step += 1
                loss, _, gradient = value_and_grad(params, (scale(images[rows], 0, 1), labels[rows]))
                check_finite(loss, step)
                if step % 100 == 0:
                    flush_denormals(ranks.own(moments))
                adam_step(params, gradient, moments, step, cosine_decay(step, total_steps, LR))
                ranks.from_owners(params)
                ranks.barrier()
                bar.update()
            accuracy = (logits_of(x_test).argmax(axis=1) == labels_test).mean()
            seconds = time.monotonic() - began
            tqdm.write(f"epoch {epoch + 1}/{EPOCHS}  loss {loss:.3f}, test accuracy {accuracy:.2%}  {seconds:.0f} s")
    checkpoint.save(args.out, params, {"seed": args.seed, "test_accuracy": float(accuracy)})
    print(f"{tree.size(params):,} parameters, test accuracy {accuracy:.2%}: {args.out}")


if __name__ == "__main__":
    cli.run(main, "stopped: the weights that were there are still there")
