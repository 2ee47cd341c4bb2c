"""Make the trained weights that come with the package, scratchgen/evaluate/*.npz, from the default runs:

  python run_vae.py
  python run_ddpm.py --T 200
  python run_ddpm.py --T 200 --classes --out runs/ddpm-classes

They have 11 million weights, 45 MB in float32 and 21 in float16. Most are in a few large matrices that see the whole
image, and those can be coarse: whole numbers times one scale for each column, -31 to 31 in the network and -8 to 8 in
the one that guides it (-63 to 63 in the VAE). The others are float16, or samples would become grainy. Compressed, that
is 7.9 MB. Then this measures what rounding costs: the Frechet distance of 10,000 images drawn from the same noise with
the weights as they were, and as they are now. Eight minutes on two cores.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from scratchgen import tree  # before NumPy, whose threads it sets up
from scratchgen.data import load_fashion_mnist, scale
from scratchgen.evaluate import classifier, load, metrics, samples
from scratchgen.machinery import checkpoint, cli, files
from scratchgen.machinery.parallel import ranks_for

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
LEVELS = {"params": 63, "ema": 31, "early": 8}  # the largest whole number
LARGE = 30_000  # numbers in a matrix that is rounded to them


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.OneLineParser("docs/pack.py", description=__doc__, formatter_class=formatter)
    parser.flag("--runs", "the folder of the runs", type=Path, default=ROOT / "runs")
    cli.add_data_flags(parser)
    args = parser.parse_args(argv)
    for name, target in load.TRAINED.items():
        path = args.runs / name / "checkpoint.npz"
        config = checkpoint.load_state(path)["config"]
        _, arrays = load.run_to_fill(config, path)
        checkpoint.fill(arrays, path)
        packed = {place: part for kind in arrays for place, part in pack(kind, arrays[kind])}
        with files.replacing(target) as temporary:
            np.savez_compressed(temporary, config=np.array(json.dumps(config)), **packed)

    test, ranks = load_fashion_mnist(args.data)["test_images"], ranks_for(args.workers)
    features = partial(classifier.features, classifier.load_classifier())

    def features_of(images):
        return samples.over_images(lambda x: features(scale(x, 0, 1)), [images], 32, ranks, "features")

    with ranks:
        real = features_of(test)
        for name in load.TRAINED:
            before, after = (
                metrics.frechet_distance(features_of(samples.draw(model, len(test), 0, ranks)), real)
                for model in (load.load_run(args.runs / name), load.load_trained(name))
            )
            print(f"{name:<14} Frechet distance of {len(test):,}: {before:.2f} as trained, {after:.2f} rounded")


def pack(kind, params):
    """Pairs (name, array) of all that `load.load_trained` needs for a tree of parameters."""
    arrays = {kind: params}
    for place, array in zip(tree.names(arrays), tree.leaves(arrays), strict=True):
        if array.size < LARGE:
            yield place, array.astype(np.float16)
        else:
            largest = np.abs(array).max(axis=tuple(range(array.ndim - 1)))  # of each column
            scale = np.maximum(largest / LEVELS[kind], 1e-7).astype(np.float16)
            yield place, np.round(array / scale.astype(np.float32)).astype(np.int8)
            yield f"{place}/scale", scale


if __name__ == "__main__":
    cli.run(main, "stopped: the weights that were there are still there")
