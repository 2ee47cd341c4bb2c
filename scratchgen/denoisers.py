"""The networks of the diffusion model: from noisy images x_t and their time steps t to a prediction of v.

`diffusion.predict_noise` adds a second channel to x_t before, and makes of v the noise eps_theta(x_t, t) that the loss
scores and the sampler uses. Dimensions: N images, H = W = 28. x is (N, H, W, 2), t is (N,), v is (N, H, W, 1).
"""

from scratchgen.layers import (
    conv,
    dense,
    global_block,
    group_norm,
    init_conv,
    init_dense,
    init_global_block,
    init_group_norm,
    init_mlp,
    init_res_block,
    mlp,
    res_block,
    time_embedding,
)
from scratchgen.ops import patches, silu, unpatch

import autograd.numpy as np

TIME_WIDTH = 128
GLOBAL_CHANNELS, GLOBAL_UNITS = 16, 256  # of each global block: channels that it reads, and its hidden units


def init_unet(rng, channels=(32, 64), blocks=1, size=(28, 28)):
    """Two resolutions: 14 x 14 with channels[0], 7 x 7 with channels[1]; ``blocks`` residual blocks each way."""
    wide, deep = channels
    middle = size[0] // 4, size[1] // 4
    return {
        "time": [init_dense(rng, TIME_WIDTH, TIME_WIDTH), init_dense(rng, TIME_WIDTH, TIME_WIDTH)],
        "inlet": init_conv(rng, 8, wide, gain=1.0),
        "down": [init_res_block(rng, wide, wide, TIME_WIDTH) for _ in range(blocks)],
        "shrink": init_dense(rng, 4 * wide, deep, gain=1.0),
        "middle": [init_res_block(rng, deep, deep, TIME_WIDTH) for _ in range(2 * blocks)],
        "global": [
            init_global_block(rng, middle, deep, GLOBAL_CHANNELS, GLOBAL_UNITS, TIME_WIDTH) for _ in range(2 * blocks)
        ],
        "grow": init_dense(rng, deep, 4 * wide, gain=1.0),
        "up": [init_res_block(rng, 2 * wide if i == 0 else wide, wide, TIME_WIDTH) for i in range(blocks)],
        "norm": init_group_norm(wide),
        "outlet": init_conv(rng, wide + 8, 4, gain=0.0),
    }


def unet(params, x, t):  # (N, H, W, 2), (N,) -> (N, H, W, 1)
    """Ho et al. 2020, App. B, in small: no layer works at 28 x 28, where it would cost four times as much.

    Where theirs has self-attention, between blocks of the lowest resolution, ours has `global_block`. Convolutions have
    to hand on, neighbour to neighbour, what the two sleeves of a shirt must agree on; and since all garments stand in
    the middle and fill the picture, it pays to learn what belongs where.
    """
    time = time_embedding(t, TIME_WIDTH)
    for layer in params["time"]:
        time = silu(dense(layer, time))

    p = patches(x, 2)  # (N, 14, 14, 8)
    h = conv(params["inlet"], p)
    for block in params["down"]:
        h = res_block(block, h, time)
    skip = h
    h = dense(params["shrink"], patches(h, 2))  # (N, 7, 7, C)
    for block, whole_image in zip(params["middle"], params["global"], strict=True):
        h = global_block(whole_image, res_block(block, h, time), time)
    h = unpatch(dense(params["grow"], h), 2)  # (N, 14, 14, C)
    h = np.concatenate([h, skip], axis=3)
    for block in params["up"]:
        h = res_block(block, h, time)
    h = silu(group_norm(params["norm"], h))
    # The noisy input joins the last convolution: the noise in it need not be carried through all the layers above.
    return unpatch(conv(params["outlet"], np.concatenate([h, p], axis=3)), 2)


def init_mlp_denoiser(rng, hidden=1024, layers=3):
    pixels = 28 * 28
    return init_mlp(rng, [2 * pixels + TIME_WIDTH, *[hidden] * layers, pixels])


def mlp_denoiser(params, x, t):  # (N, H, W, 2), (N,) -> (N, H, W, 1)
    """Pixels and time embedding side by side through a plain MLP: the smallest thing that can work."""
    pixels = np.reshape(x, (len(x), -1))
    return np.reshape(mlp(params, np.concatenate([pixels, time_embedding(t, TIME_WIDTH)], axis=1)), x[..., :1].shape)


# --arch on the command line: name -> (init, apply)
DENOISERS = {"unet": (init_unet, unet), "mlp": (init_mlp_denoiser, mlp_denoiser)}
