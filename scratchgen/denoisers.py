"""The networks of the diffusion model: they map noisy images x and time steps t to an image.

In Ho et al. 2020 the output is eps_theta(x_t, t), the predicted noise; `improved.py` interprets it differently. A
network does not depend on the schedule. With ``classes`` it also takes a label for each image.

Dimensions: N images, H = W = 28. x, (N, H, W, C), is x_t and what the additions append: C = ``inputs`` is 1 to 3.
t and labels are (N,); the output is (N, H, W, 1).
"""

from scratchgen.layers import (
    conv,
    dense,
    global_block,
    init_conv,
    init_dense,
    init_global_block,
    init_label_embedding,
    init_mlp,
    init_norm,
    init_res_block,
    label_embedding,
    mlp,
    norm_silu,
    res_block,
    time_embedding,
)
from scratchgen.ops import depth_to_space, silu, space_to_depth

import autograd.numpy as np  # NumPy with functions that autograd can record

TIME_WIDTH = 128
GLOBAL_UNITS = 256  # hidden units of each global block


def init_unet(rng, inputs=1, global_blocks=False, classes=0, channels=(32, 64), size=(28, 28)):
    """Parameters of `unet` for two resolutions: 14 x 14 with channels[0], 7 x 7 with channels[1]."""
    shallow, deep = channels

    def init_global(width, factor):  # factor^2 channels at each position: as many numbers as the image has pixels
        positions = size[0] // factor, size[1] // factor
        return init_global_block(rng, positions, width, factor**2, GLOBAL_UNITS, TIME_WIDTH)

    params = {
        "time": [init_dense(rng, TIME_WIDTH, TIME_WIDTH), init_dense(rng, TIME_WIDTH, TIME_WIDTH)],
        "conv_in": init_conv(rng, 4 * inputs, shallow, gain=1.0),
        "down_blocks": [init_res_block(rng, shallow, shallow, TIME_WIDTH)],
        "down": init_dense(rng, 4 * shallow, deep, gain=1.0),
        "middle_blocks": [init_res_block(rng, deep, deep, TIME_WIDTH) for _ in range(2)],
    }
    if global_blocks:
        params["global_down"] = [init_global(shallow, 2)]
        params["global_middle"] = [[init_global(deep, 4), init_global(deep, 4)] for _ in range(2)]
    params |= {
        "up": init_dense(rng, deep, 4 * shallow, gain=1.0),
        "up_blocks": [init_res_block(rng, 2 * shallow, shallow, TIME_WIDTH)],
        "norm_out": init_norm(shallow),
        "conv_out": init_conv(rng, shallow + 4 * inputs, 4, gain=0.0),
    }
    if classes:
        params["labels"] = init_label_embedding(rng, classes, TIME_WIDTH)
    return params


def unet(params, x, t, labels=None):  # (N, H, W, C), (N,), (N,) -> (N, H, W, 1)
    """A small U-Net after Ho et al. 2020, App. B. No layer works at 28 x 28, where it would cost four times as much.

    Theirs has self-attention at 16 x 16. Ours has none, but optionally a `global_block` at 14 x 14 and two after each
    block at 7 x 7. Convolutions pass information only from neighbour to neighbour, but the two sleeves of a shirt must
    match. All garments are centred and fill the picture, so it helps to learn what belongs where.

    The label embedding is added to the time embedding (Dhariwal and Nichol 2021, Sec. 3.1); label -1 means none.
    """
    time = time_embedding(t, TIME_WIDTH)
    if labels is not None:
        time = time + label_embedding(params["labels"], labels)
    for layer in params["time"]:
        time = silu(dense(layer, time))

    x = space_to_depth(x, 2)  # (N, 14, 14, 4 C)
    h = conv(params["conv_in"], x)
    for block in params["down_blocks"]:
        h = res_block(block, h, time)
    for block in params.get("global_down", []):
        h = global_block(block, h, time)
    skip = h
    h = dense(params["down"], space_to_depth(h, 2))  # (N, 7, 7, 64)
    for number, block in enumerate(params["middle_blocks"]):
        h = res_block(block, h, time)
        if "global_middle" in params:
            for mixing in params["global_middle"][number]:
                h = global_block(mixing, h, time)
    h = depth_to_space(dense(params["up"], h), 2)  # (N, 14, 14, 32)
    h = np.concatenate([h, skip], axis=3)
    for block in params["up_blocks"]:
        h = res_block(block, h, time)
    h = norm_silu(params["norm_out"], h)
    # The noisy input joins the last convolution: the noise in it need not be carried through all the layers above.
    return depth_to_space(conv(params["conv_out"], np.concatenate([h, x], axis=3)), 2)


def init_mlp_denoiser(rng, inputs=1, hidden=1024, depth=3):
    pixels = 28 * 28
    layers = init_mlp(rng, [inputs * pixels + TIME_WIDTH, *[hidden] * depth, pixels])
    return {"mlp": layers, "skip": init_dense(rng, TIME_WIDTH, 1, gain=0.0)}


def mlp_denoiser(params, x, t, labels=None):  # (N, H, W, C), (N,) -> (N, H, W, 1)
    """The simplest network that works: an MLP of pixels and time embedding, plus x_t times a number that depends on t.

    The noise is mostly x_t itself, scaled. Without this skip the hidden layers must learn to copy x_t, and the network
    learns to predict 0 instead. Effect: test loss 0.999 -> 0.159 (predicting eps, 2 epochs of 12,000 images, lr 1e-3).
    It ignores labels.
    """
    time = time_embedding(t, TIME_WIDTH)
    h = np.concatenate([np.reshape(x, (len(x), -1)), time], axis=1)
    skip = np.reshape(dense(params["skip"], time), (-1, 1, 1, 1))
    x_t = x[..., :1]
    return skip * x_t + np.reshape(mlp(params["mlp"], h), x_t.shape)


# --arch on the command line: name -> (init, apply)
DENOISERS = {"unet": (init_unet, unet), "mlp": (init_mlp_denoiser, mlp_denoiser)}
