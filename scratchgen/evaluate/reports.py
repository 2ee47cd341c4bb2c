"""The measurements of an evaluation. Functions ``measure_...`` print numbers and add them to metrics.json; some also
draw figures.

``report`` is a `Report`, ``model`` is one of `trained.py`, ``data`` is what `load_fashion_mnist` returns.
"""

import math
from dataclasses import asdict
from functools import partial

from scratchgen import diffusion, plots, vae
from scratchgen.data import CLASSES, scale
from scratchgen.evaluate import classifier, metrics
from scratchgen.machinery import cli, files
from scratchgen.machinery.parallel import in_parallel
from scratchgen.machinery.run import rng_for
from scratchgen.trained import draw, labels_for, over_images

import numpy as np

SHARD = 32  # images that one rank (a process) measures at a time
ROW = "{:<41} {:>7} {:>6} {:>9} {:>6} {:>6}"  # of the table of distances
BOUND, EXACT_BOUND, REAL = 100, 101, 104  # purposes for `rng_for`, besides those of `run` and `trained`


class Report:
    """The output of numbers and figures of one model. If a file cannot be written, measuring goes on, and
    ``unwritten`` keeps the error."""

    def __init__(self, folder, model, seed):
        self.folder = folder
        self.params = model.params
        self.seed = seed
        self.unwritten = []

    def add(self, entry, numbers, *lines):
        """Print lines of (name, value, remark), and add an entry to "evaluation" in metrics.json."""
        for name, value, remark in lines:
            print(f"{name:<37} {value:>9}  {remark}")
        self.write(files.add_evaluation, self.folder / "metrics.json", self.params, entry, numbers, self.seed)

    def write(self, f, *arguments):
        """Call f, which writes a file. Returns whether it could."""
        try:
            f(*arguments)
        except OSError as error:
            self.unwritten.append(error)
            return False
        return True

    def save(self, figure, name):
        if self.write(plots.save, figure, self.folder / name):
            print(f"wrote {self.folder / name}")


# ----------------------------------------------------------------------------------------------------------------- VAE


def measure_vae(report, model, data, ranks, K):
    """Measure how much each latent dimension is used and, if K is given, the importance-weighted bound."""
    x = scale(data["test_images"], 0, 1)
    codes = over_images(lambda x: np.stack(model.encode(x), axis=1), [x], SHARD, ranks, "codes")  # (N, 2, D)
    mu = codes[:, 0]
    log_var = codes[:, 1]
    kl = vae.kl_per_dimension(mu, log_var).mean(axis=0, dtype=np.float64)
    variance = mu.var(axis=0, dtype=np.float64)
    spread = np.exp(log_var).mean(axis=0, dtype=np.float64)
    active = metrics.active_units(mu)
    numbers = {
        "kl_per_dimension": kl.round(4).tolist(),
        "variance_of_mu": variance.round(4).tolist(),
        "mean_of_variance": spread.round(4).tolist(),
        "active_units": int(active.sum()),
    }
    remark = f"of {len(kl)}; their KL: {kl[active].sum():.2f} nats"
    report.add("latent", numbers, ("active latent dimensions", f"{active.sum()}", remark))
    report.save(plots.latent_use(kl, variance, spread, active), "latent_use.png")
    if K:
        bound = model.importance_weighted_bound(x, K, report.seed, ranks)
        name = f"importance-weighted bound, K = {K}"
        report.add(f"iwae_{K}", {"log_likelihood": bound}, (name, f"{bound:.2f}", "nats per image"))


# ----------------------------------------------------------------------------------------------------- diffusion model


def measure_bound(report, model, data, ranks, N):
    """Measure the variational bound with one t per image; if N is given, also with all t for N images, by parts."""
    T = model.config["T"]
    x = scale(data["test_images"], -1, 1)
    groups = model.groups_of(x, data.get("test_labels"))
    bits = partial(diffusion.bits_per_dimension, dimensions=x[0].size)
    terms_of = partial(diffusion.bound_terms, model.x_0_theta, model.schedule)

    # T L_{t-1} at one t, uniform on 1..T, has the sum of all L_{t-1} as its expectation.
    prior = bits(diffusion.prior_kl(model.schedule, x))
    # An image belongs to one group, so p(x) >= p(group) p(x | group). The other terms bound -log p(x | group).
    group = np.zeros(len(x)) if groups is None else bits(model.groups.nats(groups))
    _, t, eps = diffusion.draw_batch(model.schedule, x, rng_for(report.seed, BOUND))
    terms = bits(over_images(terms_of, [x, t, eps, groups], SHARD, ranks, "bound"))
    mean, numbers, remark = mean_and_error(group + prior + T * terms)
    report.add("bound_estimate", numbers, (f"bound, {len(x):,} images at one t each", f"{mean:.3f}", remark))
    times, count = np.unique(t, return_counts=True)
    over_t = np.bincount(t, terms)[times] / count

    if N:
        rng = rng_for(report.seed, EXACT_BOUND)
        parallel = in_parallel(terms_of, SHARD, ranks)
        times = 1 + np.arange(T)
        all_terms = np.empty((N, T))
        for t in cli.progress(T, "bound, all t", " steps", times):
            eps = rng.standard_normal(x[:N].shape, dtype=np.float32)
            all_terms[:, t - 1] = bits(parallel(x[:N], np.full(N, t), eps, None if groups is None else groups[:N]))
        over_t = all_terms.mean(axis=0)
        mean, numbers, remark = mean_and_error(group[:N] + prior[:N] + all_terms.sum(axis=1))
        parts = {"group": float(group[:N].mean()), "prior": float(prior[:N].mean())}
        parts |= {"between": float(over_t[1:].sum()), "decoder": float(over_t[0])}
        lines = [
            (f"bound, {N:,} images at every t", f"{mean:.3f}", remark),
            ("    which group it is", f"{parts['group']:.5f}", "-log of its share"),
            ("    L_T, the prior", f"{parts['prior']:.5f}", ""),
            (f"    L_1 to L_{T - 1}", f"{parts['between']:.3f}", ""),
            ("    L_0, the decoder", f"{parts['decoder']:.3f}", ""),
        ]
        report.add(f"bound_exact_{N}", numbers | parts, *lines)
    weights = diffusion.bits_per_dimension(diffusion.bound_weights(model.schedule), 1)  # in bits, too
    report.save(plots.bound_over_t(times, over_t, mean, weights), "bound.png")


def mean_and_error(bits):
    """The mean of bits per dimension over images, a dict of it and its standard error, and a remark to print."""
    mean = float(bits.mean())
    error = float(bits.std(ddof=1) / math.sqrt(len(bits)))
    return mean, {"bits_per_dimension": mean, "standard_error": error}, f"bits per dimension, +- {error:.3f}"


# ------------------------------------------------------------------------------------------- samples beside real images


def measure_samples(report, model, data, ranks, N, draws, configs, peer):
    """Compare N samples of each SamplerConfig (none for a VAE) with training images and with a VAE, the ``peer``.

    Each of the ``draws`` has its own seed, which gives the same noise to all that are compared.
    """
    seeds = range(report.seed, report.seed + draws)
    params = classifier.load_classifier()

    def features_of(images):
        return over_images(lambda x: classifier.features(params, scale(x, 0, 1)), [images], SHARD, ranks, "features")

    real = features_of(data["test_images"])
    train = data["train_images"]
    measured = {}

    def from_train(images):
        if ranks.rank > 0:  # other ranks print and write nothing
            return 0.0
        return round(float(metrics.nearest_distance(images[:1000], train).mean()), 3)

    def measure(name, images_of, labels=None, **settings):
        """Measure the images that ``images_of`` draws with each seed, and whether the first thousand are copies."""
        drawn = [images_of(seed) for seed in seeds]
        found = [features_of(images) for images in drawn]
        found = ranks.broadcast([sample_metrics(h, real, params, labels) for h in found] if ranks.rank == 0 else None)
        numbers = {key: np.mean([one[key] for one in found], axis=0).round(4).tolist() for key in found[0]}
        if draws > 1:
            numbers |= {"spread": float(np.std([one["distance"] for one in found], ddof=1)), "draws": draws}
        numbers["nearest"] = from_train(drawn[0])
        measured[name] = numbers
        cells = [name]
        for key, digits in {"distance": 2, "spread": 2, "precision": 3, "recall": 3, "agreement": 3}.items():
            cells.append(f"{numbers[key]:.{digits}f}" if key in numbers else "")
        print(ROW.format(*cells))
        report.add(f"frechet_{N}", {name: numbers | settings})

    labels = labels_for(N, None, model.config.get("classes"))
    if N < 1000:
        print(f"warning: {N} images say little: see the distance of training images")
    print("Frechet distance to the test images" + (f", and how {draws} draws differ (+-)" if draws > 1 else ""))
    if labels is not None:
        print("asked: the share that a classifier takes for the class that was asked for")
    print(ROW.format(f"{N:,} images each", "Frechet", "+-", "precision", "recall", "asked"))
    measure("training images", lambda seed: train[rng_for(seed, REAL).permutation(len(train))[:N]])
    measure("VAE", lambda seed: draw(peer or model, N, seed, ranks))
    for config in configs:
        images_of = partial(draw, model, N, ranks=ranks, labels=labels, config=config)
        measure(str(config), images_of, labels, **asdict(config))

    print("nearest: how far from the nearest training image, in grey levels of a pixel")
    print("variance: of the classifier's features, as a share of that of the test images")
    print(f"{'':<41} {'nearest':>7} {'variance':>8}")
    print(f"{'test images':<41} {from_train(data['test_images']):>7.1f} {1:>8.3f}")
    for name, numbers in measured.items():
        print(f"{name:<41} {numbers['nearest']:>7.1f} {numbers['variance']:>8.3f}")
    print("What the classifier takes them for, in %, and how sure it is, in %:")
    print(f"{'':<29}", *(f"{name[:4]:>4}" for name in CLASSES))
    for name, numbers in measured.items():
        print(f"{name[:29]:<29}", *(f"{100 * share:4.1f}" for share in numbers["share"]))
        print(f"{'    how sure':<29}", *(f"{100 * sure:4.0f}" for sure in numbers["confidence"]))


def sample_metrics(features, real, params, labels=None):
    """The metrics of samples with these features, (N, F), against ``real`` ones; with ``labels`` also the agreement.

    "share" is the share of samples that the classifier takes for each class, "confidence" how sure it is of those.
    """
    logits = classifier.logits(params, features).astype(np.float64)
    probabilities = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    taken_for = probabilities.argmax(axis=1)
    count = np.bincount(taken_for, minlength=len(CLASSES))
    numbers = {
        "distance": metrics.frechet_distance(features, real),
        "precision": metrics.precision(real, features),
        "recall": metrics.recall(real, features),
        "variance": metrics.variance_ratio(features, real),
        "share": count / len(features),
        "confidence": np.bincount(taken_for, probabilities.max(axis=1), len(CLASSES)) / np.maximum(count, 1),
    }
    return numbers if labels is None else numbers | {"agreement": np.mean(taken_for == labels)}
