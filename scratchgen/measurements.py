"""What `evaluate` measures: the functions ``measure_..`` print their numbers, add them to metrics.json and draw.

``args`` are the flags of ``evaluate.py``, ``config`` and ``params`` those of the run in the folder ``args.run``.
"""

import json
import math
from functools import partial

from scratchgen import checkpoint, classifier, cli, diffusion, metrics, plots, vae
from scratchgen.data import binarised_test, scale
from scratchgen.denoisers import DENOISERS
from scratchgen.gradients import in_parallel
from scratchgen.ops import bernoulli_log_likelihood

import numpy as np

SHARD = 32  # images that one worker draws or measures at a time
IWAE_SHARD = 8  # the same where each image takes K samples
# name -> eta and order of `diffusion.ddim_sample`
SAMPLERS = {"ddpm": (1.0, 1), "ddim": (0.0, 1), "dpm++": (0.0, 2), "sde-dpm++": (1.0, 2)}
BOUND, EXACT_BOUND, IMPORTANCE, SAMPLES, REAL = range(100, 105)  # what a stream of random numbers is for


def report(args, params, entry, numbers, *lines):
    """Print lines of (name, value, remark), and add an entry to "evaluation" in metrics.json."""
    path = args.run / "metrics.json"
    written = checkpoint.read_metrics(path, params)
    evaluation = written.setdefault("evaluation", {})
    earlier = evaluation.get(entry, {})
    evaluation[entry] = (earlier if earlier.get("seed") == args.seed else {}) | numbers | {"seed": args.seed}
    checkpoint.write_text(path, json.dumps(written, indent=2) + "\n")
    for name, value, remark in lines:
        print(f"{name:<48} {value:>9}  {remark}")


def over_images(f, arrays, shard, workers, description):
    """``f(*arrays)`` as `in_parallel` computes it, but in steps, for a progress bar."""
    parallel, N, step, results = in_parallel(f, shard, workers), len(arrays[0]), shard * workers.count, []
    with cli.progress(N, description=description) as bar:
        for start in range(0, N, step):
            results.append(parallel(*(array[start : start + step] for array in arrays)))
            bar.update(len(results[-1]))
    return np.concatenate(results)


# ----------------------------------------------------------------------------------------------------------------- VAE


def measure_vae(args, config, params, data, workers):
    encode, decode = (partial(f, params) for f in vae.VAES[config["arch"]][1:])
    x = binarised_test(data["test_images"]) if config.get("binarize") else scale(data["test_images"], 0, 1)

    codes = over_images(lambda x: np.stack(encode(x), axis=1), [x], SHARD, workers, "codes")  # (N, 2, D)
    mu, log_var = codes[:, 0], codes[:, 1]
    kl, active = vae.kl_per_dimension(mu, log_var).mean(axis=0, dtype=np.float64), metrics.active_units(mu)
    variance, spread = mu.var(axis=0, dtype=np.float64), np.exp(log_var).mean(axis=0, dtype=np.float64)
    numbers = {
        "kl_per_dimension": kl.round(4).tolist(),
        "variance_of_mu": variance.round(4).tolist(),
        "mean_of_variance": spread.round(4).tolist(),
        "active_units": int(active.sum()),
    }
    line = ("active latent dimensions", f"{active.sum()}", f"of {len(kl)}; their KL: {kl[active].sum():.2f} nats")
    report(args, params, "latent", numbers, line)
    plots.save(plots.latent_use(kl, variance, spread, active), args.run / "latent_use.png")

    if args.iwae:

        def bound(x, image):
            rngs = [np.random.default_rng([args.seed, IMPORTANCE, n]) for n in image]
            return metrics.importance_weighted_bound(encode, decode, bernoulli_log_likelihood, x, args.iwae, rngs)

        bounds = over_images(bound, [x, np.arange(len(x))], IWAE_SHARD, workers, f"IWAE, K = {args.iwae}")
        line = (f"importance-weighted bound, K = {args.iwae}", f"{bounds.mean():.2f}", "nats per image")
        report(args, params, f"iwae_{args.iwae}", {"log_likelihood": float(bounds.mean())}, line)


# ----------------------------------------------------------------------------------------------------- diffusion model


def noise_predictor(config, params):
    """The schedule of a run, and its eps_theta(x_t, t)."""
    schedule, network = diffusion.make_schedule(config["schedule"], config["T"]), DENOISERS[config["arch"]][1]
    return schedule, partial(diffusion.predict_noise, partial(network, params), schedule)


def measure_bound(args, config, params, data, workers):
    (schedule, eps_theta), T = noise_predictor(config, params), config["T"]
    x, rng = scale(data["test_images"], -1, 1), np.random.default_rng([args.seed, BOUND])
    bits = partial(metrics.bits_per_dimension, dimensions=x[0].size)
    terms_of = partial(metrics.bound_terms, eps_theta, schedule)

    # T L_{t-1} at one t, drawn evenly from 1..T, is in expectation the sum of all L_{t-1}.
    prior = bits(diffusion.prior_kl(schedule, x))
    _, t, eps = batch = diffusion.draw_batch(schedule, x, rng)
    terms = bits(over_images(terms_of, batch, SHARD, workers, "bound"))
    mean, error = mean_and_standard_error(prior + T * terms)
    line = (f"bound, {len(x):,} images at one t each", f"{mean:.3f}", f"bits per dimension, +- {error:.3f}")
    report(args, params, "bound_estimate", {"bits_per_dimension": mean, "standard_error": error}, line)
    times, count = np.unique(t, return_counts=True)
    over_t = np.bincount(t, terms)[times] / count

    if N := args.bound:
        rng, parallel = np.random.default_rng([args.seed, EXACT_BOUND]), in_parallel(terms_of, SHARD, workers)
        times, all_terms = 1 + np.arange(T), np.empty((N, T))
        for t in cli.progress_over(times, T, "bound, all t"):
            all_terms[:, t - 1] = bits(
                parallel(x[:N], np.full(N, t), rng.standard_normal(x[:N].shape, dtype=np.float32))
            )
        over_t = all_terms.mean(axis=0)
        mean, error = mean_and_standard_error(prior[:N] + all_terms.sum(axis=1))
        parts = {"prior": float(prior[:N].mean()), "between": float(over_t[1:].sum()), "decoder": float(over_t[0])}
        report(
            args,
            params,
            f"bound_exact_{N}",
            {"bits_per_dimension": mean, "standard_error": error} | parts,
            (f"bound, {N:,} images at every t", f"{mean:.3f}", f"bits per dimension, +- {error:.3f}"),
            ("    L_T, the prior", f"{parts['prior']:.5f}", ""),
            (f"    L_1 to L_{T - 1}", f"{parts['between']:.3f}", ""),
            ("    L_0, the decoder", f"{parts['decoder']:.3f}", ""),
        )
    plots.save(plots.bound_over_t(times, over_t, mean), args.run / "bound.png")


def mean_and_standard_error(values):
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


# --------------------------------------------------------------------------------------- samples and Frechet distance


def drawing(config, params, seed, sampler=None, steps=None):
    """A function from the numbers of images, (N,), to images that the model draws, uint8 (N, 28, 28, 1)."""

    def from_vae(numbers):
        rng = np.random.default_rng([seed, SAMPLES, numbers[0]])
        z = rng.standard_normal((len(numbers), config["latent_dim"]), dtype=np.float32)
        return grey_levels(vae.generate(partial(vae.VAES[config["arch"]][2], params), z), 0, 1)

    if config["model"] == "vae":
        return from_vae
    schedule, eps_theta = noise_predictor(config, params)

    def from_noise(numbers):
        rng = np.random.default_rng([seed, SAMPLES, numbers[0]])
        x_T = rng.standard_normal((len(numbers), 28, 28, 1), dtype=np.float32)
        eta, order = SAMPLERS[sampler]  # with eta = 1 and all T steps, this is Algorithm 2
        *_, (_, x_0) = diffusion.ddim_sample(eps_theta, schedule, x_T, steps, eta, rng, order)
        return grey_levels(x_0, -1, 1)

    return from_noise


def grey_levels(x, low, high):
    return np.round((x - low) * (255 / (high - low))).astype(np.uint8)


def measure_samples(args, config, params, data, workers, peer=None):
    """``peer`` is the VAE, (config, params), whose samples a diffusion model's are compared with."""

    def draw(N, *model_and_sampler):
        return over_images(drawing(*model_and_sampler), [np.arange(N)], SHARD, workers, "samples")

    def save_samples(images):
        with checkpoint.replacing(args.run / "samples.npz") as temporary:
            np.savez(temporary, images=images[: args.samples, ..., 0])
        print(f"wrote {args.samples:,} images to {args.run / 'samples.npz'}")

    model, N = (config, params, args.seed), args.frechet
    if not N:
        return save_samples(draw(args.samples, *model, args.sampler[0], args.sample_steps[0]))

    ruler = classifier.load_classifier()

    def features(images):
        return classifier.features(ruler, scale(images, 0, 1))

    def features_of(images):
        return over_images(features, [images], SHARD, workers, "features")

    reference = features_of(data["test_images"])

    def distance(name, images):
        value = metrics.frechet_distance(features_of(images[:N]), reference)
        line = (f"Frechet distance, {N:,} x {name}", f"{value:.2f}", "")
        report(args, params, f"frechet_{N}", {name: value}, line)
        return value

    some = np.random.default_rng([args.seed, REAL]).permutation(len(data["train_images"]))[:N]
    levels, curves = {"training images": distance("training images", data["train_images"][some])}, {}
    if peer:
        levels["VAE"] = distance("VAE", draw(N, *peer, args.seed))
    for sampler in args.sampler:
        for steps in args.sample_steps:
            images = draw(max(N, args.samples or 0), *model, sampler, steps)
            if args.samples:
                save_samples(images)
            value = distance("VAE" if config["model"] == "vae" else f"{sampler}, {steps} steps", images)
            curves.setdefault(sampler, []).append((steps, value))
    if len(args.sample_steps) > 1:
        plots.save(plots.distance_over_steps(curves, levels, N), args.run / "steps.png")
