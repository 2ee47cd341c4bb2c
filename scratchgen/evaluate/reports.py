"""What the evaluation measures: each function prints its numbers, adds them to metrics.json and draws.

``args`` are the flags of the program, ``model`` is a run as `load` returns it.
"""

import math
from functools import partial

from scratchgen.data import CLASSES, scale
from scratchgen.diffusion import draw_batch, prior_kl
from scratchgen.evaluate import classifier, metrics
from scratchgen.evaluate.samples import draw, over_images
from scratchgen.machinery import cli, files, plots
from scratchgen.machinery.parallel import in_parallel
from scratchgen.machinery.training import rng_for
from scratchgen.ops import bernoulli_log_likelihood
from scratchgen.vae import kl_per_dimension

import numpy as np

SHARD = 32  # images that one rank measures at a time
IWAE_SHARD = 8  # the same where each image takes K samples
BOUND, EXACT_BOUND, IMPORTANCE, REAL = 100, 101, 102, 104  # what random numbers are for


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


# ----------------------------------------------------------------------------------------------------------------- VAE


def measure_vae(args, model, data, ranks):
    x = scale(data["test_images"], 0, 1)
    codes = over_images(lambda x: np.stack(model.encode(x), axis=1), [x], SHARD, ranks, "codes")  # (N, 2, D)
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
        bound = importance_weighted_bound(model.encode, model.decode, x, args.iwae, args.seed, ranks)
        line = (f"importance-weighted bound, K = {args.iwae}", f"{bound:.2f}", "nats per image")
        report(args, model, f"iwae_{args.iwae}", {"log_likelihood": bound}, line)


def importance_weighted_bound(encode, decode, x, K, seed, ranks):
    """Mean over the images x of `metrics.importance_weighted_bound`, in nats per image, computed in parallel."""

    def bound(x, image):
        rngs = [rng_for(seed, IMPORTANCE, n) for n in image]
        return metrics.importance_weighted_bound(encode, decode, bernoulli_log_likelihood, x, K, rngs)

    return float(over_images(bound, [x, np.arange(len(x))], IWAE_SHARD, ranks, f"IWAE, K = {K}").mean())


# ----------------------------------------------------------------------------------------------------- diffusion model


def measure_bound(args, model, data, ranks):
    schedule, T, x = model.schedule, model.config["T"], scale(data["test_images"], -1, 1)
    bits = partial(metrics.bits_per_dimension, dimensions=x[0].size)
    terms_of = partial(metrics.bound_terms, model.x_0_theta, schedule)
    labels = [data["test_labels"]] if model.config["classes"] else []

    # T L_{t-1} at one t, drawn evenly from 1..T, is in expectation the sum of all L_{t-1}.
    prior = bits(prior_kl(schedule, x))
    _, t, eps = batch = draw_batch(schedule, x, rng_for(args.seed, BOUND))
    terms = bits(over_images(terms_of, [*batch, *labels], SHARD, ranks, "bound"))
    mean, error = mean_and_standard_error(prior + T * terms)
    line = (f"bound, {len(x):,} images at one t each", f"{mean:.3f}", f"bits per dimension, +- {error:.3f}")
    report(args, model, "bound_estimate", {"bits_per_dimension": mean, "standard_error": error}, line)
    times, count = np.unique(t, return_counts=True)
    over_t = np.bincount(t, terms)[times] / count

    if N := args.bound:
        rng, parallel = rng_for(args.seed, EXACT_BOUND), in_parallel(terms_of, SHARD, ranks)
        times, all_terms = 1 + np.arange(T), np.empty((N, T))
        for t in cli.progress_over(times, T, "bound, all t"):
            eps = rng.standard_normal(x[:N].shape, dtype=np.float32)
            all_terms[:, t - 1] = bits(parallel(x[:N], np.full(N, t), eps, *(y[:N] for y in labels)))
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


# ------------------------------------------------------------------------------------------- samples beside real images


def measure_samples(args, model, data, ranks, peer=None):
    """``args.ways`` are the ways to draw, {name: settings of `DDPMRun.path`}; ``peer`` is the VAE to compare with."""
    N, ruler = args.frechet, classifier.load_classifier()

    def features_of(images):
        return over_images(lambda x: classifier.features(ruler, scale(x, 0, 1)), [images], SHARD, ranks, "features")

    def sets_of(model, count, **how):  # the same noise for all that is compared
        return [draw(model, count, args.seed + number, ranks, **how) for number in range(args.draws)]

    real, numbers = features_of(data["test_images"]), {}

    def judge(name, sets, asked=None):
        """Add to ``numbers`` what the sets of images are like, and what the classifier takes them for."""
        found = [features_of(images) for images in sets]
        found = ranks.broadcast([likeness(h, real, ruler, asked) for h in found] if ranks.rank == 0 else None)
        distances = [one["distance"] for one in found]
        numbers[name] = {key: np.mean([one[key] for one in found], axis=0).round(4).tolist() for key in found[0]}
        remark = "precision {precision:.3f}, recall {recall:.3f}".format(**numbers[name])
        if asked is not None:
            remark += ", {agreement:.1%} are what was asked for".format(**numbers[name])
        if len(sets) > 1:
            numbers[name] |= {"spread": float(np.std(distances, ddof=1)), "draws": len(sets)}
            remark = "+- {spread:.2f} over {draws} draws, ".format(**numbers[name]) + remark
        line = (f"Frechet distance, {N:,} x {name}", f"{numbers[name]['distance']:.2f}", remark)
        report(args, model, f"frechet_{N}", {name: numbers[name]}, line)

    orders = [rng_for(args.seed + number, REAL).permutation(len(data["train_images"])) for number in range(args.draws)]
    judge("training images", [data["train_images"][order[:N]] for order in orders])
    if peer:
        judge("VAE", sets_of(peer, N))
    asked = np.arange(N) % len(CLASSES) if model.config.get("classes") else None
    for name, how in args.ways.items():
        judge(name, sets_of(model, N, **how), asked)

    print("what the classifier takes them for, in the order above, in %; in brackets, how sure it is")
    for k, name in enumerate(CLASSES):
        columns = (f"{each['share'][k]:8.1%} ({each['confidence'][k]:.0%})" for each in numbers.values())
        print(f"    {name:<10}", *columns)
    curves, levels = {}, {name: one["distance"] for name, one in numbers.items() if name not in args.ways}
    for name, how in args.ways.items():
        kind = name.replace(f", {how.get('steps')} steps", "")
        curves.setdefault(kind, []).append((how.get("steps"), numbers[name]["distance"]))
    if max(map(len, curves.values())) > 1:
        write(args, plots.save, plots.distance_over_steps(curves, levels, N), args.run / "steps.png")
    curves = {}
    for name, how in args.ways.items():
        curves.setdefault(how.get("guide"), []).append((how.get("guidance"), numbers[name]))
    ways = {(how.get("sampler"), how.get("steps")) for how in args.ways.values()}
    if len(ways) == 1 and max(map(len, curves.values())) > 1:
        write(args, plots.save, plots.over_guidance(curves, N), args.run / "guidance.png")


def likeness(features, real, ruler, asked=None):
    """How like real images are images with these features, (N, F)? And for each class, what share the classifier takes
    for it, and how sure it is of those."""
    logits = classifier.logits_of(ruler, features).astype(np.float64)
    probabilities = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    taken_for = probabilities.argmax(axis=1)
    count = np.bincount(taken_for, minlength=len(CLASSES))
    numbers = {
        "distance": metrics.frechet_distance(features, real),
        "precision": metrics.share_within(features, real),
        "recall": metrics.share_within(real, features),
        "share": count / len(features),
        "confidence": np.bincount(taken_for, probabilities.max(axis=1), len(CLASSES)) / np.maximum(count, 1),
    }
    return numbers if asked is None else numbers | {"agreement": np.mean(taken_for == asked)}
