"""All layers and networks once more, to compare the package's with: plain definitions, nothing of scratchgen.

Parameters are named as in the package. Everything in float64; images are (N, H, W, C).
"""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def relu(x):
    return np.where(x > 0, x, 0)


def glu(x):
    C = x.shape[-1] // 2
    return x[..., :C] * sigmoid(x[..., C:])


def dense(layer, x):
    return np.einsum("...i,io->...o", x, layer["w"]) + layer["b"]


def mlp(layers, x, activation=relu):
    *others, last = layers
    for layer in others:
        x = activation(dense(layer, x))
    return dense(last, x)


def conv(layer, x):
    """A cross-correlation with zeros around the image: for each place in the kernel, the image moved by as much."""
    _, H, W, _ = x.shape
    K = len(layer["w"])
    padded = np.pad(x, ((0, 0), (K // 2, K // 2), (K // 2, K // 2), (0, 0)))
    return layer["b"] + sum(padded[:, i : i + H, j : j + W] @ layer["w"][i, j] for i in range(K) for j in range(K))


def norm(x, groups=8):
    N, H, W, C = x.shape
    parts = x.reshape(N, H * W, groups, C // groups)
    centred = parts - parts.mean(axis=(1, 3), keepdims=True)
    return (centred / np.sqrt((centred**2).mean(axis=(1, 3), keepdims=True) + 1e-5)).reshape(x.shape)


def norm_silu(layer, x):
    return silu(norm(x) * layer["scale"] + layer["shift"])


def squares(x):
    """(N, H, W, C) -> (N, H / 2, W / 2, 4 C): the pixels of each square of two by two, row by row."""
    return np.concatenate([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=3)


def from_squares(x):
    N, H, W, C = x.shape
    y = np.empty((N, 2 * H, 2 * W, C // 4))
    for place, part in enumerate(np.split(x, 4, axis=3)):
        y[:, place // 2 :: 2, place % 2 :: 2] = part
    return y


def time_embedding(t, width):
    waves = np.array([10_000 ** -(k / (width // 2 - 1)) for k in range(width // 2)])
    return np.concatenate([np.sin(t[:, None] * waves), np.cos(t[:, None] * waves)], axis=1)


def res_block(p, x, time):
    """Norm, SiLU, convolution; norm scaled and shifted by the time, SiLU, convolution; plus the shortcut."""
    h = conv(p["conv1"], norm_silu(p["norm1"], x))
    scale, shift = (dense(p[name], time)[:, None, None] for name in ("time_scale", "time_shift"))
    h = conv(p["conv2"], silu(norm(h) * (1 + scale) + shift))
    return h + (dense(p["shortcut"], x) if "shortcut" in p else x)


def global_block(p, x, time):
    """Norm, SiLU, fewer channels; from all numbers of an image to units, scaled and shifted by the time; and back."""
    h = dense(p["squeeze"], norm_silu(p["norm"], x))
    units = dense(p["mix_in"], h.reshape(len(h), -1))
    units = silu(units * (1 + dense(p["time_scale"], time)) + dense(p["time_shift"], time))
    return x + dense(p["expand"], dense(p["mix_out"], units).reshape(h.shape))


# ------------------------------------------------------------------------------------------------------------ networks


def unet(p, x, t, labels=None):
    time = time_embedding(t, 128)
    if labels is not None:
        time = time + np.array([p["labels"]["w"][label] if label >= 0 else np.zeros(128) for label in labels])
    time = silu(dense(p["time"][1], silu(dense(p["time"][0], time))))
    x = squares(x)
    h = res_block(p["down_blocks"][0], conv(p["conv_in"], x), time)
    if "global_down" in p:
        h = global_block(p["global_down"][0], h, time)
    skip = h
    h = dense(p["down"], squares(h))
    for place in (0, 1):
        h = res_block(p["middle_blocks"][place], h, time)
        for mixing in p["global_middle"][place] if "global_middle" in p else []:
            h = global_block(mixing, h, time)
    h = np.concatenate([from_squares(dense(p["up"], h)), skip], axis=3)
    h = norm_silu(p["norm_out"], res_block(p["up_blocks"][0], h, time))
    return from_squares(conv(p["conv_out"], np.concatenate([h, x], axis=3)))


def mlp_denoiser(p, x, t, labels=None):
    time = time_embedding(t, 128)
    h = mlp(p["mlp"], np.concatenate([x.reshape(len(x), -1), time], axis=1))
    return dense(p["skip"], time)[:, :, None, None] * x[..., :1] + h.reshape(-1, 28, 28, 1)


def mlp_vae(activation):
    def encode(p, x):
        h = activation(mlp(p["encoder"], x.reshape(len(x), -1), activation))
        return dense(p["mu"], h), np.minimum(dense(p["log_var"], h), 2)

    return encode, lambda p, z: mlp(p["decoder"], z, activation).reshape(-1, 28, 28, 1)


def conv_encode(p, x):
    layer = p["encoder"]
    h = relu(conv(layer["conv14"], squares(x)))
    h = relu(dense(layer["down"], squares(h)))
    h = relu(conv(layer["conv7"], h))
    h = relu(dense(layer["hidden"], h.reshape(len(h), -1)))
    return dense(p["mu"], h), np.minimum(dense(p["log_var"], h), 2)


def conv_decode(p, z):
    layer = p["decoder"]
    h = relu(dense(layer["spread"], relu(dense(layer["hidden"], z))))
    h = relu(conv(layer["conv7"], h.reshape(-1, 7, 7, 64)))
    h = relu(conv(layer["conv14"], relu(from_squares(dense(layer["up"], h)))))
    return from_squares(dense(layer["pixels"], h))


NETWORKS = {"unet": unet, "mlp": mlp_denoiser}
VAES = {"mlp": mlp_vae(relu), "gated": mlp_vae(glu), "conv": (conv_encode, conv_decode)}
