"""What the evaluation measures: each function prints its numbers, adds them to metrics.json and draws.

``args`` are the flags of the program, ``model`` is a run as `load` returns it.
"""

import math
from functools import partial

from scratchgen.data import scale
from scratchgen.diffusion import draw_batch, prior_kl
from scratchgen.evaluate import classifier, metrics
from scratchgen.gradients import in_parallel
from scratchgen.machinery import cli, files, plots
from scratchgen.machinery.training import rng_for
from scratchgen.ops import bernoulli_log_likelihood
from scratchgen.vae import kl_per_dimension

import numpy as np

SHARD = 32  # images that one worker draws or measures at a time
IWAE_SHARD = 8  # the same where each image takes K samples
BOUND, EXACT_BOUND, IMPORTANCE, SAMPLES, REAL = range(100, 105)  # what random numbers are for


def report(args, model, entry, numbers, *lines):
    """Print lines of (name, value, remark), and add an entry to "evaluation" in metrics.json."""
    for name, value, remark in lines:
        print(f"{name:<48} {value:>9}  {remark}")
    write(args, files.add_evaluation, args.run / "metrics.json", model.params, entry, numbers, args.seed)


def write(args, f, *arguments):
    """Call f, which writes a file. Where it cannot, measuring goes on, and ``args.unwritten`` keeps the reason."""
    try:
        f(*arguments)
    except OSError as error:
        args.unwritten.append(error)


def over_images(f, arrays, shard, workers, description):
    """``f(*arrays)`` as `in_parallel` computes it, but in steps, for a progress bar."""
    parallel, N, step, results = in_parallel(f, shard, workers), len(arrays[0]), shard * workers.count, []
    with cli.progress(N, description=description) as bar:
        for start in range(0, N, step):
            results.append(parallel(*(array[start : start + step] for array in arrays)))
            bar.update(len(results[-1]))
    return np.concatenate(results)


# ----------------------------------------------------------------------------------------------------------------- VAE


def measure_vae(args, model, data, workers):
    x = scale(data["test_images"], 0, 1)
    codes = over_images(lambda x: np.stack(model.encode(x), axis=1), [x], SHARD, workers, "codes")  # (N, 2, D)
    mu, log_var = codes[:, 0], codes[:, 1]
    kl, active = kl_per_dimension(mu, log_var).mean(axis=0, dtype=np.float64), metrics.active_units(mu)
    variance, spread = mu.var(axis=0, dtype=np.float64), np.exp(log_var).mean(axis=0, dtype=np.float64)
    numbers = {
        "kl_per_dimension": kl.round(4).tolist(),
        "variance_of_mu": variance.round(4).tolist(),
        "mean_of_variance": spread.round(4).tolist(),
        "active_units": int(active.sum()),
    }
    line = ("active latent dimensions", f"{active.sum()}", f"of {len(kl)}; their KL: {kl[active].sum():.2f} nats")
    report(args, model, "latent", numbers, line)
    write(args, plots.save, plots.latent_use(kl, variance, spread, active), args.run / "latent_use.png")
    if args.iwae:
        bound = importance_weighted_bound(model.encode, model.decode, x, args.iwae, args.seed, workers)
        line = (f"importance-weighted bound, K = {args.iwae}", f"{bound:.2f}", "nats per image")
        report(args, model, f"iwae_{args.iwae}", {"log_likelihood": bound}, line)


def importance_weighted_bound(encode, decode, x, K, seed, workers):
    """Mean over the images x of `metrics.importance_weighted_bound`, in nats per image, computed in parallel."""

    def bound(x, image):
        rngs = [rng_for(seed, IMPORTANCE, n) for n in image]
        return metrics.importance_weighted_bound(encode, decode, bernoulli_log_likelihood, x, K, rngs)

    return float(over_images(bound, [x, np.arange(len(x))], IWAE_SHARD, workers, f"IWAE, K = {K}").mean())


# ----------------------------------------------------------------------------------------------------- diffusion model


def measure_bound(args, model, data, workers):
    schedule, T, x = model.schedule, model.config["T"], scale(data["test_images"], -1, 1)
    bits = partial(metrics.bits_per_dimension, dimensions=x[0].size)
    terms_of = partial(metrics.bound_terms, model.x_0_theta, schedule)

    # T L_{t-1} at one t, drawn evenly from 1..T, is in expectation the sum of all L_{t-1}.
    prior = bits(prior_kl(schedule, x))
    _, t, eps = batch = draw_batch(schedule, x, rng_for(args.seed, BOUND))
    terms = bits(over_images(terms_of, batch, SHARD, workers, "bound"))
    mean, error = mean_and_standard_error(prior + T * terms)
    line = (f"bound, {len(x):,} images at one t each", f"{mean:.3f}", f"bits per dimension, +- {error:.3f}")
    report(args, model, "bound_estimate", {"bits_per_dimension": mean, "standard_error": error}, line)
    times, count = np.unique(t, return_counts=True)
    over_t = np.bincount(t, terms)[times] / count

    if N := args.bound:
        rng, parallel = rng_for(args.seed, EXACT_BOUND), in_parallel(terms_of, SHARD, workers)
        times, all_terms = 1 + np.arange(T), np.empty((N, T))
        for t in cli.progress_over(times, T, "bound, all t"):
            eps = rng.standard_normal(x[:N].shape, dtype=np.float32)
            all_terms[:, t - 1] = bits(parallel(x[:N], np.full(N, t), eps))
        over_t = all_terms.mean(axis=0)
        mean, error = mean_and_standard_error(prior[:N] + all_terms.sum(axis=1))
        parts = {"prior": float(prior[:N].mean()), "between": float(over_t[1:].sum()), "decoder": float(over_t[0])}
        lines = [
            (f"bound, {N:,} images at every t", f"{mean:.3f}", f"bits per dimension, +- {error:.3f}"),
            ("    L_T, the prior", f"{parts['prior']:.5f}", ""),
            (f"    L_1 to L_{T - 1}", f"{parts['between']:.3f}", ""),
            ("    L_0, the decoder", f"{parts['decoder']:.3f}", ""),
        ]
        numbers = {"bits_per_dimension": mean, "standard_error": error} | parts
        report(args, model, f"bound_exact_{N}", numbers, *lines)
    weights = metrics.bits_per_dimension(metrics.loss_weights(schedule), 1)  # in bits, too
    write(args, plots.save, plots.bound_over_t(times, over_t, mean, weights), args.run / "bound.png")


def mean_and_standard_error(values):
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


# --------------------------------------------------------------------------------------- samples and Frechet distance


def draw(model, N, seed, workers, *sampler_and_steps):
    """N samples of a model as grey levels, uint8 (N, 28, 28, 1)."""

    def from_shard(numbers):
        rng = rng_for(seed, SAMPLES, numbers[0])
        return grey_levels(model.sample(len(numbers), rng, *sampler_and_steps))

    return over_images(from_shard, [np.arange(N)], SHARD, workers, "samples")


def save_images(path, images):
    with files.replacing(path) as temporary:
        np.savez(temporary, images=images)
    print(f"wrote {len(images):,} images to {path}")


def grey_levels(x):
    return np.round(x * 255).astype(np.uint8)


def measure_samples(args, model, data, workers, peer=None):
    """``peer`` is the VAE whose samples a diffusion model's are compared with."""
    N, is_vae = args.frechet, model.config["model"] == "vae"

    def draw_and_save(*sampler_and_steps):
        images = draw(model, max(N or 0, args.samples or 0), args.seed, workers, *sampler_and_steps)
        if args.samples:
            write(args, save_images, args.run / "samples.npz", images[: args.samples, ..., 0])
        return images

    samplers = [()] if is_vae else [(sampler, steps) for sampler in args.sampler for steps in args.sample_steps]
    if not N:
        return draw_and_save(*samplers[0])

    ruler = classifier.load_classifier()

    def features_of(images):
        return over_images(lambda x: classifier.features(ruler, scale(x, 0, 1)), [images], SHARD, workers, "features")

    reference = features_of(data["test_images"])

    def distance(name, images):
        value = metrics.frechet_distance(features_of(images[:N]), reference)
        line = (f"Frechet distance, {N:,} x {name}", f"{value:.2f}", "")
        report(args, model, f"frechet_{N}", {name: value}, line)
        return value

    some = rng_for(args.seed, REAL).permutation(len(data["train_images"]))[:N]
    levels, curves = {"training images": distance("training images", data["train_images"][some])}, {}
    if peer:
        levels["VAE"] = distance("VAE", draw(peer, N, args.seed, workers))
    for sampler in samplers:
        value = distance("VAE" if is_vae else "{}, {} steps".format(*sampler), draw_and_save(*sampler))
        if not is_vae:
            curves.setdefault(sampler[0], []).append((sampler[1], value))
    if len(args.sample_steps) > 1:
        write(args, plots.save, plots.distance_over_steps(curves, levels, N), args.run / "steps.png")
