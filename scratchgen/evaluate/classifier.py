"""A small convolutional classifier of FashionMNIST, used for its features and, in reports, its classes.

`metrics.frechet_distance` compares images by the features of this network. Its weights lie beside this file, in
``classifier.npz``, so that all distances are comparable; ``docs/train_classifier.py`` made them.

Dimensions: N images, H = W = 28, one channel, in [0, 1]; K = 10 classes; F = 64 features.
"""

from pathlib import Path

from scratchgen import tree
from scratchgen.layers import conv, dense
from scratchgen.machinery import checkpoint
from scratchgen.ops import relu, space_to_depth

import autograd.numpy as np

WEIGHTS = Path(__file__).with_name("classifier.npz")


def features(params, x):  # (N, H, W, 1) -> (N, F)
    """The activations of the last hidden layer, from which the classes are predicted."""
    h = space_to_depth(x, 2)  # (N, 14, 14, 4)
    for layer in params["conv14"]:
        h = relu(conv(layer, h))
    h = relu(dense(params["down"], space_to_depth(h, 2)))  # (N, 7, 7, 64)
    for layer in params["conv7"]:
        h = relu(conv(layer, h))  # at last (N, 7, 7, 32)
    return relu(dense(params["features"], np.reshape(h, (len(x), -1))))


def logits(params, h):  # (N, F) -> (N, K)
    return dense(params["classes"], h)


def load_classifier():
    """The weights that lie beside this file. Raises CheckpointError."""
    named, _ = checkpoint.load(WEIGHTS)
    return tree.nested(named)
