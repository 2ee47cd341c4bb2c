"""Layers: ``init_x(rng, ...)`` makes the parameters of layer x, and ``x(params, ...)`` below it applies them.

Dimensions: N images, H height, W width, C channels in, O channels out, E the width of the time embedding.
Parameters are dicts and lists of float32 arrays; ``rng`` is a ``numpy.random.Generator``. ``dense`` and ``norm_silu``
call the functions of ops.py with the same names; ``conv`` calls ``ops.conv2d``.
"""

from scratchgen import ops

import numpy as np

GROUPS = 8  # of every group norm; channel counts are multiples of it


def init_dense(rng, inputs, outputs, gain=2.0):
    """Weights from N(0, gain / inputs), biases zero. Gain 2 preserves the mean square of activations through a
    ReLU (He et al. 2015)."""
    w = rng.standard_normal((inputs, outputs), dtype=np.float32)
    w *= float(gain / inputs) ** 0.5
    return {"w": w, "b": np.zeros(outputs, np.float32)}


def dense(params, x):  # (..., C) -> (..., O)
    return ops.dense(x, params["w"], params["b"])


def init_mlp(rng, sizes, gated=False):
    """Dense layers from sizes[0] to sizes[-1]. The last has gain 1, because no activation follows it.

    With ``gated`` all layers but the last have twice as many outputs, and `ops.glu` halves their number. Gain 2 is
    derived for ReLUs, and works for gates, too.
    """
    units = 2 if gated else 1
    outputs = [units * size for size in sizes[1:-1]] + [sizes[-1]]
    gains = [2.0] * (len(sizes) - 2) + [1.0]
    return [init_dense(rng, i, o, gain) for i, o, gain in zip(sizes, outputs, gains, strict=False)]


def mlp(params, x, activation=ops.relu):  # (N, sizes[0]) -> (N, sizes[-1])
    """Dense layers with an activation, by default a ReLU, between them."""
    for layer in params[:-1]:
        x = activation(dense(layer, x))
    return dense(params[-1], x)


def init_conv(rng, inputs, outputs, kernel_size=3, gain=2.0):
    weights = init_dense(rng, kernel_size**2 * inputs, outputs, gain)
    return {"w": weights["w"].reshape(kernel_size, kernel_size, inputs, outputs), "b": weights["b"]}


def conv(params, x):  # (N, H, W, C) -> (N, H, W, O)
    return ops.conv2d(x, params["w"], params["b"])


def time_embedding(t, width):
    """A sinusoidal embedding (after Vaswani et al. 2017, Sec. 3.5): (N,) integers -> (N, width) float32, width even.

    Sines, then cosines. Their wavelengths grow geometrically from 2 pi to 2 pi 10,000, so that both neighbouring and
    distant steps get different embeddings.
    """
    frequencies = 10_000.0 ** -np.linspace(0, 1, width // 2, dtype=np.float32)
    angles = np.asarray(t, np.float32)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def init_label_embedding(rng, classes, width):
    return {"w": rng.standard_normal((classes, width), dtype=np.float32)}


def label_embedding(params, labels):  # (N,) integers, -1 or a class -> (N, width)
    """The row of w for each image's label; zeros for label -1, which means no label."""
    one_hot = (labels[:, None] == np.arange(len(params["w"]))).astype(np.float32)
    return one_hot @ params["w"]


def init_norm(channels):
    return {"scale": np.ones(channels, np.float32), "shift": np.zeros(channels, np.float32)}


def norm_silu(params, x):  # (N, H, W, C) -> (N, H, W, C)
    return ops.norm_silu(x, params["scale"], params["shift"], GROUPS)


def init_res_block(rng, inputs, outputs, time_width):
    """A residual block; its second convolution starts at zero, so that the block starts as its shortcut."""
    params = {
        "norm1": init_norm(inputs),
        "conv1": init_conv(rng, inputs, outputs),
        "time_scale": init_dense(rng, time_width, outputs, gain=0.1),
        "time_shift": init_dense(rng, time_width, outputs, gain=0.1),
        "conv2": init_conv(rng, outputs, outputs, gain=0.0),
    }
    if inputs != outputs:
        params["shortcut"] = init_dense(rng, inputs, outputs, gain=1.0)
    return params


def res_block(params, x, time):  # (N, H, W, C), (N, E) -> (N, H, W, O)
    """Norm, SiLU, convolution, twice, added to a shortcut (Ho et al. 2020, App. B).

    The time embedding sets scale and shift of the second norm, image by image (Dhariwal and Nichol 2021, Sec. 3.1);
    the norm multiplies and adds per image and channel anyway, so this costs nothing.
    """
    h = conv(params["conv1"], norm_silu(params["norm1"], x))
    scale = 1 + dense(params["time_scale"], time)
    shift = dense(params["time_shift"], time)
    h = conv(params["conv2"], ops.norm_silu(h, scale, shift, GROUPS))
    return h + (dense(params["shortcut"], x) if "shortcut" in params else x)


def init_global_block(rng, size, channels, squeezed, hidden, time_width):
    """A `global_block` for images of ``size`` = (H, W), with S = ``squeezed`` channels; it starts as the identity."""
    positions = size[0] * size[1]
    return {
        "norm": init_norm(channels),
        "squeeze": init_dense(rng, channels, squeezed, gain=1.0),
        "mix_in": init_dense(rng, positions * squeezed, hidden),
        "time_scale": init_dense(rng, time_width, hidden, gain=0.1),
        "time_shift": init_dense(rng, time_width, hidden, gain=0.1),
        "mix_out": init_dense(rng, hidden, positions * squeezed, gain=1.0),
        "expand": init_dense(rng, squeezed, channels, gain=0.0),
    }


def global_block(params, x, time):  # (N, H, W, C), (N, E) -> (N, H, W, C)
    """A residual block whose hidden units see the whole image: they have a weight for every position.

    Norm, SiLU and a dense layer reduce C channels to S at each position. A dense layer maps all H W S numbers of the
    image to the hidden units. The time embedding sets their scale and shift; then come SiLU and two dense layers back.
    MLP-Mixer (Tolstikhin et al. 2021) is similar, but mixes the positions of one channel at a time. Here all positions
    and channels mix at once. Effect of these blocks ("global" in `improved.py`): Frechet distance 17 -> 4.6.
    """
    h = dense(params["squeeze"], norm_silu(params["norm"], x))  # (N, H, W, S)
    units = dense(params["mix_in"], h.reshape((len(x), -1)))
    scale = 1 + dense(params["time_scale"], time)
    shift = dense(params["time_shift"], time)
    units = ops.silu(units * scale + shift)
    return x + dense(params["expand"], dense(params["mix_out"], units).reshape(h.shape))
