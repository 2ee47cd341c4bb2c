"""The networks of the diffusion model: noisy images x and their time steps t in, an image out.

For Ho et al. 2020 the image that comes out is eps_theta(x_t, t), the predicted noise; `improved.py` reads it
differently. A network knows nothing of schedules. Where it was made with ``classes`` it may be told a label for each
image.

Dimensions: N images, H = W = 28. x is (N, H, W, 1), or (N, H, W, 2) with ``inputs=2``; t is (N,), and so are labels;
out comes (N, H, W, 1).
"""

from scratchgen import layers
from scratchgen.ops import depth_to_space, silu, space_to_depth

import autograd.numpy as np  # NumPy with functions that autograd can record

TIME_WIDTH = 128
GLOBAL_UNITS = 256  # hidden units of each global block


def init_unet(rng, inputs=1, global_blocks=False, classes=0, channels=(32, 64), blocks=1, size=(28, 28)):
    """Two resolutions: 14 x 14 with channels[0], 7 x 7 with channels[1]; ``blocks`` residual blocks each way."""
    shallow, deep = channels

    def global_block(channels, factor):  # factor^2 channels at each position: as many numbers as the image has pixels
        there = size[0] // factor, size[1] // factor
        return layers.init_global_block(rng, there, channels, factor**2, GLOBAL_UNITS, TIME_WIDTH)

    return {
        "time": [layers.init_dense(rng, TIME_WIDTH, TIME_WIDTH), layers.init_dense(rng, TIME_WIDTH, TIME_WIDTH)],
        "conv_in": layers.init_conv(rng, 4 * inputs, shallow, gain=1.0),
        "down_blocks": [layers.init_res_block(rng, shallow, shallow, TIME_WIDTH) for _ in range(blocks)],
        "down": layers.init_dense(rng, 4 * shallow, deep, gain=1.0),
        "middle_blocks": [layers.init_res_block(rng, deep, deep, TIME_WIDTH) for _ in range(2 * blocks)],
        "global_down": [global_block(shallow, 2) for _ in range(global_blocks)],
        "global_middle": [[global_block(deep, 4) for _ in range(2 * global_blocks)] for _ in range(2 * blocks)],
        "up": layers.init_dense(rng, deep, 4 * shallow, gain=1.0),
        "up_blocks": [
            layers.init_res_block(rng, 2 * shallow if i == 0 else shallow, shallow, TIME_WIDTH) for i in range(blocks)
        ],
        "norm_out": layers.init_norm(shallow),
        "conv_out": layers.init_conv(rng, shallow + 4 * inputs, 4, gain=0.0),
        "labels": layers.init_label_embedding(rng, classes, TIME_WIDTH) if classes else {},
    }


def unet(params, x, t, labels=None):  # (N, H, W, 1 or 2), (N,), (N,) -> (N, H, W, 1)
    """Ho et al. 2020, App. B, in small: no layer works at 28 x 28, where it would cost four times as much.

    Theirs has self-attention at 16 x 16. Ours has none, but may have a `global_block` at 14 x 14 and two after each
    block at 7 x 7: convolutions can only hand on from neighbour to neighbour what the two sleeves of a shirt must agree
    on; and since all garments are centred and fill the picture, it pays to learn what belongs where.

    A label's embedding joins that of the time (Dhariwal and Nichol 2021, Sec. 3.1); -1 is for an image without one.
    """
    time = layers.time_embedding(t, TIME_WIDTH)
    if labels is not None:
        time = time + layers.label_embedding(params["labels"], labels)
    for layer in params["time"]:
        time = silu(layers.dense(layer, time))

    x = space_to_depth(x, 2)  # (N, 14, 14, 4 or 8)
    h = layers.conv(params["conv_in"], x)
    for block in params["down_blocks"]:
        h = layers.res_block(block, h, time)
    for block in params["global_down"]:
        h = layers.global_block(block, h, time)
    skip = h
    h = layers.dense(params["down"], space_to_depth(h, 2))  # (N, 7, 7, C)
    for block, global_blocks in zip(params["middle_blocks"], params["global_middle"], strict=True):
        h = layers.res_block(block, h, time)
        for global_block in global_blocks:
            h = layers.global_block(global_block, h, time)
    h = depth_to_space(layers.dense(params["up"], h), 2)  # (N, 14, 14, C)
    h = np.concatenate([h, skip], axis=3)
    for block in params["up_blocks"]:
        h = layers.res_block(block, h, time)
    h = layers.norm_silu(params["norm_out"], h)
    # The noisy input joins the last convolution: the noise in it need not be carried through all the layers above.
    return depth_to_space(layers.conv(params["conv_out"], np.concatenate([h, x], axis=3)), 2)


def init_mlp_denoiser(rng, inputs=1, hidden=1024, depth=3):
    pixels = 28 * 28
    return layers.init_mlp(rng, [inputs * pixels + TIME_WIDTH, *[hidden] * depth, pixels])


def mlp_denoiser(params, x, t):  # (N, H, W, 1 or 2), (N,) -> (N, H, W, 1)
    """Pixels and time embedding side by side through a plain MLP: the smallest thing that can work."""
    h = np.concatenate([np.reshape(x, (len(x), -1)), layers.time_embedding(t, TIME_WIDTH)], axis=1)
    return np.reshape(layers.mlp(params, h), x[..., :1].shape)


# --arch on the command line: name -> (init, apply)
DENOISERS = {"unet": (init_unet, unet), "mlp": (init_mlp_denoiser, mlp_denoiser)}
