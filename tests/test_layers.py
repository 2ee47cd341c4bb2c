"""Each layer against a plain definition, its gradients against finite differences; and where each array starts."""

from functools import partial

from scratchgen import layers, ops, tree
from scratchgen.denoisers import init_mlp_denoiser, init_unet
from scratchgen.vae import VAES

import numpy as np
import plain
import pytest
from finite_differences import assert_directional, shaken

N, H, W, C, O, E = 2, 4, 6, 8, 16, 10
LABELS = np.array([2, -1], np.int8)
IMAGES, WITH_TIME = [(N, H, W, C)], [(N, H, W, C), (N, E)]


def label_embedding(params, x):
    """Its row of the table for the first image, nothing for the second."""
    return x + np.array([1, 0])[:, None] * params["w"][LABELS]


CASES = {  # name -> init, the layer, its definition, and the shapes of what it takes
    "dense": (lambda r: layers.init_dense(r, C, O), layers.dense, plain.dense, [(N, C)]),
    "mlp": (lambda r: layers.init_mlp(r, [C, 7, 5, O]), layers.mlp, plain.mlp, [(N, C)]),
    "gated mlp": (
        lambda r: layers.init_mlp(r, [C, 7, 5, O], gated=True),
        partial(layers.mlp, activation=ops.glu),
        partial(plain.mlp, activation=plain.glu),
        [(N, C)],
    ),
    "conv": (lambda r: layers.init_conv(r, C, O), layers.conv, plain.conv, IMAGES),
    "conv 1x1": (lambda r: layers.init_conv(r, C, O, kernel_size=1), layers.conv, plain.conv, IMAGES),
    "norm_silu": (lambda r: layers.init_norm(O), layers.norm_silu, plain.norm_silu, [(N, H, W, O)]),
    "res_block": (lambda r: layers.init_res_block(r, C, O, E), layers.res_block, plain.res_block, WITH_TIME),
    "res_block same width": (lambda r: layers.init_res_block(r, C, C, E), layers.res_block, plain.res_block, WITH_TIME),
    "global_block": (
        lambda r: layers.init_global_block(r, (H, W), C, 3, 7, E),
        layers.global_block,
        plain.global_block,
        WITH_TIME,
    ),
    "label_embedding": (
        lambda r: layers.init_label_embedding(r, 3, E),
        lambda params, x: x + layers.label_embedding(params, LABELS),
        label_embedding,
        [(N, E)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_its_definition_and_has_the_gradients_of_finite_differences(rng, name):
    init, apply, definition, shapes = CASES[name]
    params = shaken(rng, init(rng), 0.3), [rng.standard_normal(shape) for shape in shapes]
    found = apply(params[0], *params[1])
    np.testing.assert_allclose(found, definition(params[0], *params[1]), rtol=1e-9, atol=1e-9)
    u = rng.standard_normal(found.shape)
    assert_directional(lambda p: (u * apply(p[0], *p[1])).sum(), params, rng, rtol=1e-5)


def test_time_embedding_follows_its_formula_and_tells_steps_apart():
    e = layers.time_embedding(np.arange(1001), 32)
    assert e.dtype == np.float32
    np.testing.assert_allclose(e, plain.time_embedding(np.arange(1001), 32), atol=2e-4)
    products = e[1:] @ e[1:].T  # cosine and sine of each wave: all embeddings have one length, 4
    assert np.sqrt(32 - 2 * np.max(products - 99 * np.eye(1000))) > 0.05


# ------------------------------------------------------------------------------------------------ where training starts
# The gain of a layer's weights: their mean square times the number of inputs. 2 in front of a ReLU or SiLU keeps the
# mean square of activations, 1 where no activation follows, 0 where something is to start as nothing.

RES_BLOCK = {"conv1": 2, "conv2": 0, "time_scale": 0.1, "time_shift": 0.1, "shortcut": 1}
GLOBAL_BLOCK = {"squeeze": 1, "mix_in": 2, "time_scale": 0.1, "time_shift": 0.1, "mix_out": 1, "expand": 0}
UNET = {"time/0": 2, "time/1": 2, "conv_in": 1, "down": 1, "up": 1, "conv_out": 0} | RES_BLOCK | GLOBAL_BLOCK
DENSE_VAE = {"encoder/0": 2, "encoder/1": 1, "mu": 1, "log_var": 0, "decoder/0": 2, "decoder/1": 2, "decoder/2": 1}
CONV_VAE = {"conv14": 2, "down": 2, "conv7": 2, "hidden": 2, "mu": 1, "log_var": 0, "spread": 2, "up": 2, "pixels": 1}
NETWORKS = {  # name -> init, the number of its parameters, and the gain of each layer by the end of its name
    "vae mlp": (partial(VAES["mlp"][0], latent_dim=20), 670_424, DENSE_VAE),
    "vae gated": (partial(VAES["gated"][0], latent_dim=20), 1_092_824, DENSE_VAE),
    "vae conv": (partial(VAES["conv"][0], latent_dim=20), 1_725_676, CONV_VAE),
    "ddpm mlp": (init_mlp_denoiser, 3_837_841, {"mlp/0": 2, "mlp/1": 2, "mlp/2": 2, "mlp/3": 1, "skip": 0}),
    "ddpm unet": (init_unet, 298_132, UNET),
    "ddpm unet, all": (partial(init_unet, inputs=3, global_blocks=True, classes=10), 2_653_864, UNET),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_each_array_starts_with_its_spread(network, rng):
    init, size, gains = NETWORKS[network]
    params = init(rng)
    assert tree.size(params) == size
    for name, array in zip(tree.names(params), tree.leaves(params), strict=True):
        layer, _, kind = name.rpartition("/")
        if kind != "w":
            assert np.all(array == (kind == "scale")), name  # scales are one, biases and shifts zero
            continue
        inputs = 1 if layer == "labels" else array.size // array.shape[-1]
        (gain,) = {1} if layer == "labels" else {gains[end] for end in gains if f"/{layer}".endswith(f"/{end}")}
        error = 4 * (2 / array.size) ** 0.5  # four standard deviations of a mean square
        assert inputs * np.mean(array.astype(float) ** 2) == pytest.approx(gain, rel=error), name
        assert abs(array.mean()) <= 4 * (gain / inputs / array.size) ** 0.5, name


def test_blocks_start_as_their_shortcuts(rng):
    x = rng.standard_normal((N, H, W, C), dtype=np.float32)
    time = rng.standard_normal((N, E), dtype=np.float32)
    params = layers.init_res_block(rng, C, C, E)
    assert "shortcut" not in params  # of equal width it is the input itself
    np.testing.assert_array_equal(layers.res_block(params, x, time), x)
    params = layers.init_global_block(rng, (H, W), C, 3, 7, E)
    np.testing.assert_array_equal(layers.global_block(params, x, time), x)
