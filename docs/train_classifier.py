"""Train the classifier whose features the Frechet distance compares: eight
epochs, four minutes on two cores.

The package has its weights. This command made them:

    python docs/train_classifier.py --out scratchgen/evaluate/classifier.npz

With --drawn 10000 it trains the same network three times on ten thousand
garments drawn by the package's model with classes, and three times on as many
real ones. docs/figures/classifier_drawn.png shows the accuracy of both on the
test images, by class. Six minutes.
"""

import math
import time
from pathlib import Path

from scratchgen import plots, tree  # before NumPy: sets NumPy's threads
from scratchgen.data import CLASSES, first_images, load_fashion_mnist, minibatches, scale
from scratchgen.evaluate.classifier import WEIGHTS, features, logits
from scratchgen.layers import init_conv, init_dense
from scratchgen.machinery import checkpoint, cli, files
from scratchgen.machinery.parallel import in_parallel, ranks_for, sharded
from scratchgen.machinery.run import check_finite, rng_for
from scratchgen.ops import mean
from scratchgen.optim import adam_step, cosine_decay, flush_denormals, init_moments
from scratchgen.trained import draw, load_trained

import autograd.numpy as np
from autograd.tracer import getval
from matplotlib.figure import Figure
from tqdm import tqdm

FIGURE = Path(__file__).with_name("figures") / "classifier_drawn.png"
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
    help = "compare classifiers that learn from N drawn and from N real images; --out is not written"
    parser.flag("--drawn", help, type=cli.number(int, 1), metavar="N")
    parser.flag("--figure", "of --drawn", type=Path, default=FIGURE, metavar="FILE")
    args = parser.parse_args(argv)
    if args.out.is_dir():
        parser.error(f"--out {args.out} is a folder")
    files.check_output(args.out)
    if args.drawn:
        plots.check_figure(args.figure)
    data = load_fashion_mnist(args.data)
    if args.drawn:
        compare(args, data)
        return
    params, right = train((data["train_images"], data["train_labels"]), data, args.seed, args.workers)
    checkpoint.save(args.out, params, {"seed": args.seed, "test_accuracy": float(right.mean())})
    print(f"{tree.size(params):,} parameters, test accuracy {right.mean():.2%}: {args.out}")


def train(images_and_labels, data, seed, workers):
    """The parameters after EPOCHS on these images, and whether they are right about each test image, (N,)."""
    images, labels = images_and_labels
    ranks = ranks_for(workers)
    x_test, labels_test = scale(data["test_images"], 0, 1), data["test_labels"]
    params = init_classifier(rng_for(seed, 0))
    params, moments = ranks.share((params, init_moments(params)))
    value_and_grad = sharded(cross_entropy, ranks, params, SHARD, BATCH)
    logits_of = in_parallel(lambda x: logits(params, features(params, x)), SHARD, ranks)
    total_steps, step, began = EPOCHS * math.ceil(len(images) / BATCH), 0, time.monotonic()
    with ranks, cli.progress(total_steps, None, " steps") as bar:
        for epoch in range(EPOCHS):
            for rows in minibatches(np.arange(len(images)), BATCH, rng_for(seed, 1, epoch)):
                step += 1
                loss, _, gradient = value_and_grad(params, (scale(images[rows], 0, 1), labels[rows]))
                check_finite(loss, step)
                if step % 100 == 0:
                    flush_denormals(ranks.own(moments))
                adam_step(params, gradient, moments, step, cosine_decay(step, total_steps, LR))
                ranks.from_owners(params)
                ranks.barrier()
                bar.update()
            right = logits_of(x_test).argmax(axis=1) == labels_test
            seconds = time.monotonic() - began
            tqdm.write(
                f"epoch {epoch + 1}/{EPOCHS}  loss {loss:.3f}, test accuracy {right.mean():.2%}  {seconds:.0f} s"
            )
    return params, right


def compare(args, data):
    """Train on drawn images and on real ones, with three seeds each, and draw the accuracy of both by class."""
    N, labels = args.drawn, np.arange(args.drawn) % len(CLASSES)
    real = first_images((data["train_images"], data["train_labels"]), N)
    with ranks_for(args.workers) as ranks:
        drawn = draw(load_trained("ddpm-classes"), N, args.seed, ranks, labels)
    right = {}
    for name, images_and_labels in (("drawn", (drawn, labels)), ("real", real)):
        seeds = range(args.seed, args.seed + 3)
        right[name] = np.array([train(images_and_labels, data, seed, args.workers)[1] for seed in seeds])
        accuracy = right[name].mean(axis=1)
        found = f"{accuracy.mean():.1%} +- {100 * accuracy.std(ddof=1):.1f} of the test images"
        print(f"trained on {N:,} {name} images, right about {found}")
    plots.save(by_class(right, data["test_labels"], N), args.figure)
    print(f"wrote {args.figure}")


def by_class(right, labels, N):
    """A pair of bars for each class: the accuracy of each classifier. ``right`` is name -> (seeds, images)."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.add_subplot(title=f"real test images recognised after training on {N:,} images")
    for place, (name, of_name) in enumerate(right.items()):
        heights = [100 * of_name[:, labels == k].mean() for k in range(len(CLASSES))]
        axes.bar(np.arange(len(CLASSES)) + 0.4 * place - 0.2, heights, 0.4, label=f"{name}: {of_name.mean():.1%}")
    axes.set_xticks(range(len(CLASSES)), CLASSES)
    axes.set_ylabel("right, % (mean of three seeds)")
    axes.legend(loc="lower left")
    return figure


if __name__ == "__main__":
    cli.run(main, "stopped: the weights that were there are still there")
