"""The figures. Most functions return a ``matplotlib.figure.Figure``, which has a method savefig(path).

Images come as (N, H, W, 1) in the range given by ``low`` and ``high``, by default [0, 1]. To write: `plot_latents`.
"""

import math

import numpy as np
from matplotlib.figure import Figure


def new_figure(width, height):  # in inches
    return Figure(figsize=(width, height), layout="constrained")


def mosaic(images, rows, columns, line=1):
    """Images side by side, row by row, with lines (NaN) of so many pixels between them: (rows * columns, H, W, 1) -> a
    picture of (rows (H + line) - line, columns (W + line) - line)."""
    H, W = images.shape[1:3]
    framed = np.full((rows, H + line, columns, W + line), np.nan, np.float32)
    framed[:, :H, :, :W] = images.reshape(rows, columns, H, W).transpose(0, 2, 1, 3)
    return framed.reshape(rows * (H + line), -1)[: rows * (H + line) - line, : columns * (W + line) - line]


def show(axes, picture, low=0, high=1, **options):
    axes.imshow(picture, cmap="gray", vmin=low, vmax=high, **options)
    axes.set(xticks=[], yticks=[], facecolor="silver")  # the colour of NaN


def grid(images, columns, title, low=0, high=1):
    """All images in one panel, ``columns`` to a row."""
    rows = len(images) // columns
    figure = new_figure(0.6 * columns, 0.6 * rows + 0.4)
    show(figure.add_subplot(title=title), mosaic(images, rows, columns), low, high)
    return figure


def row_of_times(images, times, title):
    """One row of panels, one image each, titled with its t: a list of (H, W, 1) in [-1, 1], and one of integers."""
    figure = new_figure(1.7 * len(times), 2.3)
    figure.suptitle(title)
    for axes, image, t in zip(figure.subplots(1, len(times), squeeze=False)[0], images, times, strict=True):
        show(axes, image[..., 0], -1, 1)
        axes.set_title(f"t = {t}")
    return figure


def curves(log, ylabel):
    """A dict of lists, name -> a number for each epoch, in one panel."""
    figure = new_figure(6, 3.6)
    axes = figure.add_subplot(xlabel="epoch", ylabel=ylabel)
    for name, values in log.items():
        axes.plot(np.arange(1, len(values) + 1), values, marker=".", label=name)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


# --------------------------------------------------------------------------------------------------------- question 6


def plot_latents(decode, latent_dim, i, j, n=10, extent=3.0):
    """n x n images decoded from codes of which dimensions i and j vary, and all others are zero.

    decode: a function of z (N, latent_dim) that returns images (N, 28, 28, 1) in [0, 1]. z_i and z_j take n values
    each, evenly from -extent to extent; z_i grows to the right and z_j upwards. Returns a matplotlib figure.
    """
    raise NotImplementedError("question 6: write plot_latents")
