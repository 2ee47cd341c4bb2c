"""Make docs/latents.html: the trained VAE of the package in one file that opens
in a browser, without a server or a network.

    python docs/page.py

The page is docs/latents.template.html with data in it: the weights as they are
in scratchgen/weights/vae.npz, in base64; the KL of each latent dimension, as a
mean over the test images; the codes of 1,000 test images; and 20 of these
images to click.
"""

import base64
import json
from pathlib import Path

from scratchgen import vae
from scratchgen.data import CLASSES, DATA, load_fashion_mnist, scale
from scratchgen.evaluate.metrics import active_units
from scratchgen.machinery import checkpoint, cli, files
from scratchgen.trained import WEIGHTS, load_trained

import numpy as np

HERE = Path(__file__).resolve().parent
TEMPLATE, PAGE = HERE / "latents.template.html", HERE / "latents.html"
CODE_SCALE = 1 / 32  # of codes, as whole numbers from -127 to 127


def main(argv=None):
    parser = cli.OneLineParser("docs/page.py", __doc__)
    help = "folder with the four FashionMNIST idx files, compressed or not (default: data/ beside the run scripts)"
    parser.flag("--data", help, type=Path, default=DATA, metavar="DIR")
    args = parser.parse_args(argv)
    text = page(load_fashion_mnist(args.data))
    files.write_text(PAGE, text)
    print(f"{PAGE}: {len(text.encode()):,} bytes")


def page(data):
    """The text of the page, from the arrays of `load_fashion_mnist`."""
    return TEMPLATE.read_text(encoding="utf-8").replace("DATA", json.dumps(contents(data), indent=1))


def contents(data):
    """The data of the page, by name; arrays are as `encoded` gives them."""
    x, labels = scale(data["test_images"], 0, 1), data["test_labels"]
    mu, log_var = load_trained("vae").encode(x)
    active = np.flatnonzero(active_units(mu))
    codes = first_of_each_class(labels, 100)
    images = first_of_each_class(labels, 2)
    images = images[np.argsort(labels[images], kind="stable")]  # class by class
    weights, _ = checkpoint.load(WEIGHTS["vae"])
    return {
        "classes": CLASSES,
        "kl": [round(float(nats), 4) for nats in vae.kl_per_dimension(mu, log_var).mean(axis=0)],
        "active": active.tolist(),
        "max_log_var": vae.MAX_LOG_VAR,
        "code_scale": CODE_SCALE,
        "codes": encoded(np.clip(np.round(mu[codes][:, active] / CODE_SCALE), -127, 127).astype(np.int8)),
        "code_labels": encoded(labels[codes]),
        "image_numbers": images.tolist(),
        "image_labels": encoded(labels[images]),
        "images": encoded(data["test_images"][images]),
        "weights": {place.removeprefix("params/"): encoded(array) for place, array in weights.items()},
    }


def first_of_each_class(labels, count):
    """The numbers of the first ``count`` images of each class, in the order of the images."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(len(CLASSES))]))


def encoded(array):
    """The dtype of an array, int8, uint8 or float16, and its bytes in base64, the lower one of a float16 first."""
    return [array.dtype.name, base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()]


if __name__ == "__main__":
    cli.run(main, "stopped: the page that was there is still there")
