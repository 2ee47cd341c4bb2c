"""The figures. Most functions return a ``matplotlib.figure.Figure``, and `save` writes it; no global pyplot state.

Images come as (N, H, W, 1) in the range given by ``low`` and ``high``, by default [0, 1].
"""

import math
import os
from contextlib import suppress
from functools import cache

from scratchgen.data import UserError
from scratchgen.machinery.files import by_rank_0, check_output, replacing

import numpy as np

FORWARD = "forward: $x_t \\sim q(x_t|x_0)$, of one noise $\\epsilon$"  # titles
REVERSE = "reverse: $x_{t-1} \\sim p_\\theta(x_{t-1}|x_t)$"
TRAIN = {"color": "C0", "label": "train"}
TEST = {"color": "C1", "label": "test", "linestyle": "--"}


@cache
def import_matplotlib():
    """Returns matplotlib. Raises UserError: its import reads settings and writes a cache, and so can fail."""
    backend = os.environ.pop("MPLBACKEND", None)  # set by a notebook; a program started from it may lack this backend
    try:
        import matplotlib.animation
        import matplotlib.figure
    except Exception as error:
        raise UserError(f"matplotlib cannot be imported: {error}") from None
    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    return matplotlib


def new_figure(width, height):  # in inches
    return import_matplotlib().figure.Figure(figsize=(width, height), layout="constrained")


def check_figure(path):
    """Raise UserError or OSError now if `save` could not write to ``path`` later."""
    kinds = new_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise UserError(f"{path}: expected a name that ends in one of .{', .'.join(kinds)}")
    check_output(path)


@by_rank_0
def save(figure, path):
    """Write a figure, for example a .png. An earlier file at ``path`` is replaced only when the new one is complete."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")  # no title is cut off, no margin stays empty


def mosaic(images, rows, columns, line=1):
    """One picture of all images, row by row, with lines of NaN, ``line`` pixels wide, between them:
    (rows * columns, H, W, 1) -> (rows (H + line) - line, columns (W + line) - line)."""
    H, W = images.shape[1:3]
    framed = np.full((rows, H + line, columns, W + line), np.nan, np.float32)
    framed[:, :H, :, :W] = images.reshape(rows, columns, H, W).transpose(0, 2, 1, 3)
    return framed.reshape(rows * (H + line), -1)[: rows * (H + line) - line, : columns * (W + line) - line]


def show(axes, picture, low=0, high=1, **options):
    axes.imshow(picture, cmap="gray", vmin=low, vmax=high, **options)
    axes.set(xticks=[], yticks=[], facecolor="silver")  # the colour of NaN


def grid(images, columns, title, low=0, high=1, row_labels=(), column_labels=()):
    """One panel with all images, ``columns`` to a row; ``row_labels`` stand at the left, ``column_labels`` above."""
    rows = len(images) // columns
    figure = new_figure(0.6 * columns + 0.6, 0.6 * rows + 0.6)
    axes = figure.add_subplot(title=title)
    show(axes, mosaic(images, rows, columns), low, high)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    if len(row_labels):
        axes.set_yticks([29 * row + 14 for row in range(rows)], row_labels, fontsize="small")
    if len(column_labels):
        axes.set_xticks([29 * column + 14 for column in range(columns)], column_labels, fontsize="small")
    return figure


def reconstructions(x, decoded, columns=10):
    """Rows of images ``x`` and, below each row, the images ``decoded`` from their codes; both are (N, H, W, 1)."""
    pairs = np.stack([a.reshape(-1, columns, *a.shape[1:]) for a in (x, decoded)], axis=1)
    labels = ["test", "decoded"] * len(pairs)
    title = "test images, and decoded from their $\\mu$"
    return grid(pairs.reshape(-1, *x.shape[1:]), columns, title, row_labels=labels)


def interpolation(decode, start, end, x_start, x_end, n=10):
    """One row for each pair of test images, (N, H, W, 1): n images decoded at even steps from the code ``start`` to the
    code ``end``, (N, D), with the two test images at the ends."""
    weights = np.linspace(0, 1, n, dtype=np.float32)[:, None]
    z = (1 - weights) * start[:, None] + weights * end[:, None]  # (N, n, D)
    decoded = decode(z.reshape(-1, z.shape[-1])).reshape(len(z), n, *x_start.shape[1:])
    rows = np.concatenate([x_start[:, None], decoded, x_end[:, None]], axis=1)
    labels = ["test", *(f"{weight:.2f}" for weight in weights[:, 0]), "test"]
    title = "from one test image to another, evenly in z"
    return grid(rows.reshape(-1, *x_start.shape[1:]), n + 2, title, column_labels=labels)


def nearest(images, others, count=3):
    """One column for each image, with the ``count`` nearest of ``others`` below it; all are (.., H, W, 1), uint8."""
    flat = others.reshape(len(others), -1).astype(np.float32)
    squares = np.einsum("mp,mp->m", flat, flat)
    x = images.reshape(len(images), -1).astype(np.float32)
    distances = squares - 2 * x @ flat.T  # squared, without the term that all others share
    places = np.argsort(distances, axis=1, kind="stable")[:, :count]
    rows = np.concatenate([images, *(others[places[:, k]] for k in range(places.shape[1]))])
    labels = ["sample", *(f"nearest {k + 1}" for k in range(places.shape[1]))]
    return grid(rows, len(images), "samples, and the training images nearest to them, by pixels", 0, 255, labels)


def codes_by_class(mu, kl, labels, classes):
    """Codes ``mu`` of test images, (N, D), in the two dimensions with the largest ``kl``, (D,), coloured by label."""
    i, j = sorted(np.argsort(kl)[-2:].tolist())
    figure = new_figure(7.4, 6)
    axes = figure.add_subplot(title="codes $\\mu$ of test images, in the two dimensions with most KL")
    colours = np.array([f"C{label}" for label in range(len(classes))])
    axes.scatter(mu[:, i], mu[:, j], s=4, alpha=0.5, c=colours[labels])  # mixed: drawn last, a class would hide others
    for name, colour in zip(classes, colours, strict=True):
        axes.scatter([], [], s=4, color=colour, label=name)
    axes.set(xlabel=f"$\\mu_{{{i}}}$", ylabel=f"$\\mu_{{{j}}}$", aspect="equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), markerscale=4)
    return figure


def plot_latents(decode, latent_dim, i, j, n=10, extent=3.0):
    """Images decoded over an even n x n grid of (z_i, z_j) from -extent to extent, all other dimensions zero.

    ``decode`` takes (N, D) to images (N, H, W, 1) in [0, 1]; z_i grows to the right and z_j upwards.
    """
    ticks = np.linspace(-extent, extent, n)
    z = np.zeros((n * n, latent_dim), np.float32)
    z[:, i] = np.tile(ticks, n)
    z[:, j] = np.repeat(ticks[::-1], n)
    edge = extent + extent / (n - 1)  # the last image ends half a step beyond its middle
    figure = new_figure(6.6, 6.6)
    title = "decoded from z" if latent_dim == 2 else f"decoded from z, all but dimensions {i} and {j} zero"
    axes = figure.add_subplot(title=title)
    show(axes, mosaic(decode(z), n, n, line=0), extent=(-edge, edge) * 2)
    axes.set_xticks(np.arange(-math.floor(extent), extent + 1))
    axes.set_yticks(np.arange(-math.floor(extent), extent + 1))
    axes.set(xlabel=f"$z_{{{i}}}$", ylabel=f"$z_{{{j}}}$")
    return figure


def curves(axes, log, key):
    epochs = [row["epoch"] for row in log]
    for part in (TRAIN, TEST):
        values = [row[f"{part['label']}_{key}"] for row in log]
        axes.plot(epochs, values, marker="." if len(log) < 40 else None, **part)
    axes.set(xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)


def vae_loss(log, floor):
    """Three panels by epoch: the ELBO, its first and its second term; train and test, in nats per image.

    ``log`` has the rows of log.csv. ``floor`` is the entropy of the pixels, or None if they have none.
    """
    figure = new_figure(12, 3.6)
    panels = figure.subplots(1, 3)
    titles = {
        "elbo": "ELBO",
        "reconstruction": "first term: $E_q[\\log p(x|z)]$",
        "kl": "second term: $D_{KL}(q(z|x)\\,||\\,p(z))$",
    }
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        curves(axes, log, key)
        axes.set(title=title, ylabel="nats per image")
        # Most is learned in the first epoch. It is cut off, because it would flatten the curves of all others.
        later = [row[f"{part}_{key}"] for row in log[1:] for part in ("train", "test")]
        if later and key != "kl":
            top = max(later) if floor is None else -floor
            axes.set_ylim(min(later) - 0.1 * (top - min(later)), top + 0.1 * (top - min(later)))
            axes.set_ylabel("nats per image (from epoch 2 on)")
    panels[2].set_ylim(0, panels[2].get_ylim()[1])
    panels[2].legend(loc="lower right")
    for axes in [] if floor is None else panels[:2]:
        axes.axhline(-floor, color="gray", linewidth=1, linestyle=":")
        axes.annotate(
            "no model gets above: minus the entropy of the pixels",
            (0.5, -floor),
            xycoords=("axes fraction", "data"),
            xytext=(0, -4),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize="small",
        )
    return figure


def ddpm_loss(log, t, errors, bins=40):
    """Two panels: the loss of eps by epoch, and the final test loss over t.

    ``errors`` are those of test images, in order of ``t``. Each point is the mean of one of ``bins`` equal parts.
    """
    figure = new_figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    curves(left, log, "loss")
    left.legend(
        ["train, weights of each step", "test, moving average of the weights"],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=2,
        fontsize="small",
    )
    left.set(title="loss: mean of $(\\epsilon - \\epsilon_\\theta)^2$", ylabel="squared error per pixel")
    bins = min(bins, len(np.unique(t)))
    t, errors = ([part.mean() for part in np.array_split(values, bins)] for values in (t, errors))
    right.semilogy(t, errors, marker=".", color="C1")
    right.set(title="test loss over t", xlabel="t", ylabel="squared error per pixel")
    right.grid(alpha=0.3, which="both")
    return figure


def latent_use(kl, variance, spread, active):
    """Two panels over latent dimensions, in descending order of KL: the KL in nats, and the variance of z in two parts.

    All are (D,): ``variance`` is the variance of mu over images, ``spread`` the mean of sigma^2. Their sum is the
    variance of z. It is 1 if z is distributed as in the prior.
    """
    figure = new_figure(10, 3.6)
    left, right = figure.subplots(1, 2)
    order = np.argsort(-kl)[:60]  # more could not be read, and thousands take a minute to draw
    places = np.arange(len(order))
    colours = np.where(active, "C0", "lightgray")[order]
    left.bar(places, kl[order], color=colours)
    left.set(title=f"KL of each dimension, {kl.sum():.1f} nats in all", ylabel="nats, mean over test images")
    right.bar(places, variance[order], color=colours, label="variance of $\\mu$")
    right.bar(places, spread[order], bottom=variance[order], color="C1", alpha=0.5, label="mean of $\\sigma^2$")
    right.axhline(1, color="gray", linewidth=1, linestyle=":", label="variance of the prior")
    right.set(
        title=f"{active.sum()} of {len(kl)} active: variance of $\\mu$ above 0.01", ylabel="variance, over test images"
    )
    figure.legend(fontsize="small", loc="outside lower right", ncols=3)
    for axes in (left, right):
        axes.set_xlabel("latent dimension, by KL" + (", the first 60" if len(kl) > 60 else ""))
        axes.set_xticks(places, order, fontsize="x-small", rotation=90)
        axes.grid(alpha=0.3, axis="y")
    return figure


def bound_over_t(t, bits, bound, weights):
    """The terms of the variational bound against t: L_0 at t = 1, then L_1 .. L_{T-1}, in bits per dimension.

    ``weights`` are the w_t for t = 2..T in bits: the L_{t-1} of a network that predicts eps_theta = 0.
    """
    figure = new_figure(7, 3.8)
    axes = figure.add_subplot(title=f"the terms of the bound, {bound:.2f} bits per dimension in all")
    axes.loglog(t, bits, marker=".", color="C1", label="of the network")
    axes.loglog(np.arange(2, len(weights) + 2), weights, "C0--", label="$w_t$, the term of $\\epsilon_\\theta = 0$")
    axes.annotate("$L_0$, the decoder", (t[0], bits[0]), textcoords="offset points", xytext=(12, 4), va="center")
    axes.set(xlabel="t", ylabel="$L_{t-1}$, bits per dimension")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def row_of_times(images, times, title):
    """One row of panels, one image each, (H, W, 1) in [-1, 1], with its t as the title; ``times`` are integers."""
    figure = new_figure(1.7 * len(times), 2.3)
    figure.suptitle(title)
    for axes, image, t in zip(figure.subplots(1, len(times), squeeze=False)[0], images, times, strict=True):
        show(axes, image[..., 0], -1, 1)
        axes.set_title(f"t = {t}")
    return figure


@by_rank_0
def save_gif(frames, columns, path, frames_per_second=12, pause=18):
    """Write an animation of mosaics. ``frames`` maps each t to images (N, H, W, 1) in [-1, 1], in the order in which
    they appear. The last is repeated ``pause`` times."""
    pictures = [(t, mosaic(images, len(images) // columns, columns)) for t, images in frames.items()]
    H, W = pictures[0][1].shape
    figure = import_matplotlib().figure.Figure(figsize=(W / 50, H / 50 + 0.3))
    axes = figure.add_axes((0, 0, 1, H / (H + 15)))
    show(axes, pictures[0][1], -1, 1)
    writer = import_matplotlib().animation.PillowWriter(fps=frames_per_second)
    with replacing(path) as temporary, writer.saving(figure, temporary, dpi=200):
        for t, picture in pictures + pictures[-1:] * pause:
            axes.images[0].set_data(picture)
            axes.set_title(f"t = {t}", y=1, pad=3)
            writer.grab_frame()
