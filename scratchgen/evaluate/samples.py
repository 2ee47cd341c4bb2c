"""What a trained model draws, in parallel, and the figures of run_ddpm.py that are made of it."""

from scratchgen import diffusion
from scratchgen.data import CLASSES
from scratchgen.machinery import cli, files, plots
from scratchgen.machinery.parallel import in_parallel
from scratchgen.machinery.training import SAMPLES, rng_for

import numpy as np

SHARD = 16  # images that one rank draws at a time
TIMES = (1, 0.5, 0.25, 0.1, 0.05, 0)  # of the strips, as parts of T: 200, 100, 50, 20, 10, 0


def over_images(f, arrays, shard, ranks, description):
    """``f(*arrays)`` as `in_parallel` computes it, but in steps, for a progress bar."""
    parallel, N, results = in_parallel(f, shard, ranks), len(arrays[0]), []
    step = shard * ranks.count * ranks.threads
    with cli.progress(N, description=description) as bar:
        for start in range(0, N, step):
            results.append(parallel(*(array[start : start + step] for array in arrays)))
            bar.update(len(results[-1]))
    return np.concatenate(results)


def draw(model, N, seed, ranks, labels=None, **how):
    """N samples of a model as grey levels, uint8 (N, 28, 28, 1); ``how`` goes to its ``sample``.

    For the same seed the first images have the same noise whatever N is, and however they are drawn from it.
    """
    if model.config.get("classes") and labels is None:
        labels = np.arange(N) % len(CLASSES)  # all equally often

    def from_shard(numbers, *labels):
        rng = rng_for(seed, SAMPLES, numbers[0])
        return grey_levels(model.sample(len(numbers), rng, *labels, **how))

    arrays = [np.arange(N)] if labels is None else [np.arange(N), labels]
    return over_images(from_shard, arrays, SHARD, ranks, "samples")


def grey_levels(x):
    return np.round(x * 255).astype(np.uint8)


@files.by_rank_0
def save_images(path, images):
    with files.replacing(path) as temporary:
        np.savez(temporary, images=images)
    print(f"wrote {len(images):,} images to {path}")


def draw_paths(model, x_0, seed, folder):
    """An image x_0, (1, H, W, 1), on its way to noise, forward.png; and by Algorithm 2 from noise to images: the first
    in trajectory.png, and sixteen in sampling.gif."""
    T, rng = model.config["T"], rng_for(seed, SAMPLES)
    times = [round(T * fraction) for fraction in TIMES]
    eps = rng.standard_normal(x_0.shape, dtype=np.float32)
    noisy = diffusion.q_sample(model.schedule, x_0, np.array(times), eps)  # one image at six times
    plots.save(plots.row_of_times(noisy, times, plots.FORWARD), folder / "forward.png")

    frames = sorted({round(t) for t in np.linspace(T, 0, 51)}, reverse=True)  # of the animation
    x_T = rng.standard_normal((16, *x_0.shape[1:]), dtype=np.float32)
    path = cli.progress_over(model.path(x_T, rng, sampler="ddpm"), T, "Algorithm 2")
    seen = {T: x_T} | {t: x_t for t, x_t in path if t in times or t in frames}
    plots.save(plots.row_of_times([seen[t][0] for t in times], times, plots.REVERSE), folder / "trajectory.png")
    plots.save_gif([seen[t] for t in frames], 4, folder / "sampling.gif")


def classes(model, seed, ranks):
    """A figure: ten images of each class, and beside them each class from one and the same noise, by guide and w."""
    images = draw(model, 100, seed, ranks)  # one class after the other
    noise = rng_for(seed, SAMPLES).standard_normal((1, *images.shape[1:]), dtype=np.float32)
    x_T, steps, rows = np.repeat(noise, len(CLASSES), axis=0), min(20, model.config["T"]), {}
    for guide in ["early", "unlabelled"] if model.x_0_early else ["unlabelled"]:
        for w in (0, 0.5, 1, 2, 4):
            # A sampler in which nothing else is random.
            *_, (_, x_0) = model.path(x_T, None, sampler="dpm++", steps=steps, guidance=w, guide=guide)
            rows[f"{guide}, w = {w:g}"] = x_0
    of_each = images.reshape(-1, len(CLASSES), *images.shape[1:]).swapaxes(0, 1).reshape(images.shape)
    return plots.classes(of_each, CLASSES, rows)
