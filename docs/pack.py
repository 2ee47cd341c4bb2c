"""Make the trained weights that come with the package,
scratchgen/weights/*.npz, from the default runs:

  python run_vae.py
  python run_ddpm.py --T 200
  python run_ddpm.py --T 200 --classes --out runs/ddpm-classes

They have 11 million weights, 45 MB in float32. Most are in the large matrices
of the blocks that see the whole image. Arrays of 30,000 numbers or more are
rounded to whole numbers times one scale for each column: -31 to 31 in the
network, -7 to 7 in its guide, -63 to 63 in the VAE. So are the mean images of
the groups, -31 to 31. All others are float16; rounded further, they would make
samples grainy. Compressed, that is 8.0 MB.

Then the cost of rounding is measured: the Frechet distance of 10,000 images
drawn from the same noise with the original weights and with the rounded ones.
Eight minutes on two cores.
"""

import json
import zipfile
from functools import partial
from pathlib import Path

from scratchgen.data import load_fashion_mnist, scale  # before NumPy: sets NumPy's threads
from scratchgen.evaluate import classifier, metrics
from scratchgen.machinery import checkpoint, cli, files
from scratchgen.machinery.parallel import ranks_for
from scratchgen.trained import WEIGHTS, draw, load_run, load_trained, over_images

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
LEVELS = {"params": 63, "ema": 31, "early": 7, "groups": 31}  # the largest whole number
LARGE = 30_000  # numbers; smaller arrays are only rounded to float16


def main(argv=None):
    parser = cli.OneLineParser("docs/pack.py", __doc__)
    parser.flag("--runs", "the folder of the runs", type=Path, default=ROOT / "runs")
    cli.add_data_flags(parser)
    args = parser.parse_args(argv)
    for name, target in WEIGHTS.items():
        named, state = checkpoint.load(args.runs / name / "checkpoint.npz")
        config = state["config"]
        if config["model"] == "ddpm":  # which draws with the moving averages of its weights
            named = {place: array for place, array in named.items() if not place.startswith("params/")}
        packed = dict(part for place, array in named.items() for part in pack(place, array))
        with files.replacing(target) as temporary:  # a checkpoint, but compressed
            np.savez_compressed(temporary, state=np.array(json.dumps({"config": config})), **packed)
            with zipfile.ZipFile(temporary, "a") as archive:
                archive.comment = checkpoint.checksum(archive)

    test, ranks = load_fashion_mnist(args.data)["test_images"], ranks_for(args.workers)
    features = partial(classifier.features, classifier.load_classifier())

    def features_of(images):
        return over_images(lambda x: features(scale(x, 0, 1)), [images], 32, ranks, "features")

    with ranks:
        real = features_of(test)
        for name in WEIGHTS:
            before, after = (
                metrics.frechet_distance(features_of(draw(model, len(test), 0, ranks)), real)
                for model in (load_run(args.runs / name), load_trained(name))
            )
            print(f"{name:<14} Frechet distance of {len(test):,}: {before:.2f} as trained, {after:.2f} rounded")


def pack(place, array):
    """The arrays, as pairs (name, array), from which `trained.load_trained` restores an array of a checkpoint."""
    kind = place.split("/")[0]
    if kind not in LEVELS:  # the optimiser's, and previews
        return
    if array.size < LARGE:
        yield place, array.astype(np.float16)
    else:
        largest = np.abs(array).max(axis=tuple(range(array.ndim - 1)))  # of each column
        scale = np.maximum(largest / LEVELS[kind], 1e-7).astype(np.float16)
        yield place, np.round(array / scale.astype(np.float32)).astype(np.int8)
        yield f"{place}/scale", scale


if __name__ == "__main__":
    cli.run(main, "stopped: the weights that were there are still there")
