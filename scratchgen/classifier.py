"""A small convolutional classifier of FashionMNIST: not for its labels, but for its features.

`metrics.frechet_distance` compares images by what this network sees in them. Its weights lie beside this file, in
``classifier.npz``, so that everyone measures with the same ruler; this command made them:

    python -m scratchgen.classifier --out scratchgen/classifier.npz

Dimensions: N images, H = W = 28, one channel, in [0, 1]; K = 10 classes; F = 64 features.
"""

import math
import time
from functools import partial
from pathlib import Path

from scratchgen import checkpoint, cli, tree
from scratchgen.data import load_fashion_mnist, minibatches, scale
from scratchgen.gradients import in_parallel, sharded_value_and_grad
from scratchgen.layers import conv, dense, init_conv, init_dense
from scratchgen.ops import patches, relu
from scratchgen.optim import adam_step, cosine_decay, init_adam
from scratchgen.runtime import Workers

import autograd.numpy as np
from autograd.tracer import getval
from tqdm import tqdm

WEIGHTS = Path(__file__).with_name("classifier.npz")
EPOCHS, BATCH, SHARD, LR = 8, 128, 64, 2e-3


def init_classifier(rng):
    return {
        "conv14": [init_conv(rng, 4, 32), init_conv(rng, 32, 32)],
        "shrink": init_dense(rng, 4 * 32, 64),
        "conv7": [init_conv(rng, 64, 64), init_conv(rng, 64, 32)],
        "features": init_dense(rng, 7 * 7 * 32, 64),
        "classes": init_dense(rng, 64, 10, gain=1.0),
    }


def features(params, x):  # (N, H, W, 1) -> (N, F)
    """What the last hidden layer sees: all that the classes are told apart by."""
    h = patches(x, 2)  # (N, 14, 14, 4)
    for layer in params["conv14"]:
        h = relu(conv(layer, h))
    h = relu(dense(params["shrink"], patches(h, 2)))  # (N, 7, 7, 64)
    for layer in params["conv7"]:
        h = relu(conv(layer, h))  # at last (N, 7, 7, 32)
    return relu(dense(params["features"], np.reshape(h, (len(x), -1))))


def logits(params, x):  # (N, H, W, 1) -> (N, K)
    return dense(params["classes"], features(params, x))


def cross_entropy(params, batch):
    """-log p(label | x) in nats, as a mean over the batch: (N, H, W, 1), (N,) integers -> scalar."""
    x, labels = batch
    scores = logits(params, x)
    scores = scores - getval(scores).max(axis=1, keepdims=True)  # changes no difference, and exp cannot overflow
    log_p = scores - np.log(np.sum(np.exp(scores), axis=1, keepdims=True))
    return np.sum(log_p[np.arange(len(labels)), labels]) * (-1 / len(labels))


def load_classifier():
    """The weights that lie beside this file. Raises CheckpointError."""
    params = init_classifier(np.random.default_rng(0))
    arrays, _ = checkpoint.load(WEIGHTS, keys=["test_accuracy"])
    checkpoint.fill(params, arrays, WEIGHTS)
    return params


def main():
    parser = cli.OneLineParser(
        prog="python -m scratchgen.classifier",
        description=f"Train the classifier whose features the Frechet distance compares: {EPOCHS} epochs.",
    )
    cli.add_data_flags(parser)
    parser.add_argument("--seed", type=cli.number(int, 0), default=0, help="decides every random number (default: 0)")
    help = f"where the weights go; distances are measured with those in {WEIGHTS} (default: runs/classifier.npz)"
    parser.add_argument("--out", type=Path, default=Path("runs/classifier.npz"), metavar="FILE", help=help)
    args = parser.parse_args()
    if args.out.is_dir():
        parser.error(f"--out {args.out} is a folder")
    data, workers = load_fashion_mnist(args.data), Workers(args.workers)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    train, labels = data["train_images"], data["train_labels"]
    x_test, labels_test = scale(data["test_images"], 0, 1), data["test_labels"]

    arrays = init_classifier(np.random.default_rng([args.seed, 0]))
    arrays = workers.share({"params": arrays, "adam": init_adam(arrays)})
    params = arrays["params"]
    gradient_of = sharded_value_and_grad(cross_entropy, SHARD, workers)
    logits_of = in_parallel(partial(logits, params), SHARD, workers)
    steps, step, began = math.ceil(len(train) / BATCH), 0, time.monotonic()
    with cli.progress(EPOCHS * len(train)) as bar:
        for epoch in range(EPOCHS):
            for rows in minibatches(np.arange(len(train)), BATCH, np.random.default_rng([args.seed, 1, epoch])):
                loss, gradient = gradient_of(params, (scale(train[rows], 0, 1), labels[rows]))
                cli.check_finite(loss, step)
                lr = cosine_decay(step, EPOCHS * steps, LR)
                step += 1
                adam_step(params, gradient, arrays["adam"], step, lr)
                bar.update(len(rows))
            accuracy = (logits_of(x_test).argmax(axis=1) == labels_test).mean()
            seconds = time.monotonic() - began
            tqdm.write(f"epoch {epoch + 1}/{EPOCHS}  loss {loss:.3f}, test accuracy {accuracy:.2%}  {seconds:.0f} s")
    checkpoint.save(args.out, params, {"seed": args.seed, "test_accuracy": float(accuracy)})
    print(f"{tree.size(params):,} parameters, test accuracy {accuracy:.2%}: {args.out}")


if __name__ == "__main__":
    cli.run(main, "stopped: the weights that were there are still there")
