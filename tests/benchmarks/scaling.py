"""How time and peak memory depend on the cores, the batch size, T and the number of training images.

    python tests/benchmarks/scaling.py

Every measurement has its own process, and so its own peak memory. They are taken in turns: all of them once, then all
of them again. The time is the median over the turns. Memory is the sum of all ranks' peak resident sizes: an upper
bound, as pages that a fork shares count in each. (From /proc: Linux only.)
"""

import argparse
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from scratchgen import denoisers, diffusion, improved, plots, samplers, tree, vae
from scratchgen.data import load_fashion_mnist, minibatches, scale
from scratchgen.machinery import blas
from scratchgen.machinery.parallel import Ranks, in_parallel, shard_size, sharded
from scratchgen.muon import muon_step
from scratchgen.optim import adam_step, ema_step, init_moments
from scratchgen.trained import SHARD as SAMPLE_SHARD

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

CORES = blas.available_cores()
UNET_BATCH, VAE_BATCH, SAMPLES = 64, 128, 32  # images in a minibatch, and drawn
POWERS = [2**k for k in range(10)]
# name -> (what varies, its values, what is timed, function of a value that returns (ms, MiB))
MEASUREMENTS = {
    "U-Net step, cores": ("cores", [n for n in POWERS if n <= CORES], "a step, batch 64", lambda n: unet(cores=n)),
    "VAE step, cores": ("cores", [n for n in POWERS if n <= CORES], "a step, batch 128", lambda n: vae_steps(cores=n)),
    "U-Net step, batch": ("batch size", [32, 64, 128, 256, 512], "a step", lambda n: unet(batch=n)),
    "VAE step, batch": ("batch size", [32, 64, 128, 256, 512], "a step", lambda n: vae_steps(batch=n)),
    "U-Net sampling, T": ("T", [50, 100, 200, 500, 1000], f"{SAMPLES} samples", lambda n: sampling(n)),
    "VAE epoch, images": ("training images", [7_500, 15_000, 30_000, 60_000], "an epoch", lambda n: epoch(n)),
}


def train_images(count):
    return load_fashion_mnist(Path(__file__).parents[2] / "data")["train_images"][:count]


def trainer(ranks, params, batch_size, loss, optimiser_step, ema):
    """A training step as a function of (batch, number of the step), for all ranks."""
    arrays = ranks.share({"params": params, "ema": tree.map(np.copy, params), "moments": init_moments(params)})
    params = arrays["params"]
    moments = arrays["moments"]
    value_and_grad = sharded(loss, ranks, params, shard_size(batch_size, ranks.processes), batch_size)

    def step(batch, number):
        _, _, gradient = value_and_grad(params, batch)
        optimiser_step(params, gradient, moments, number, 1e-3)
        if ema:
            ema_step(ranks.own(arrays["ema"]), params, number, 0.998)
        ranks.barrier()

    return step


def per_step(step, ranks, steps=8):
    """Median ms of a step, after two warm-up steps, and peak memory."""
    times = []
    with ranks:
        for number in range(1, steps + 3):
            start = time.perf_counter()
            step(number)
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times[2:]), peak(ranks)


def peak(ranks):
    """Peak MiB, summed over ranks."""
    status = Path("/proc/self/status").read_text()
    return sum(ranks.all_gather(int(status.split("VmHWM:")[1].split()[0]))) / 1024


def default_unet(schedule, rng):  # -> parameters, Denoiser
    params = improved.init_denoiser(denoisers.init_unet, rng, improved.ADDITIONS)
    return params, improved.Denoiser(denoisers.unet, schedule, improved.ADDITIONS)


def unet(batch=UNET_BATCH, cores=CORES):
    rng = np.random.default_rng(0)
    ranks = Ranks(cores)
    schedule = diffusion.make_schedule("linear", 200)
    images = scale(train_images(batch), -1, 1)
    params, denoiser = default_unet(schedule, rng)
    weights = improved.step_weights(schedule)

    def loss(params, batch):
        return diffusion.simple_loss(partial(denoiser.eps, params), schedule, batch, weights)

    step = trainer(ranks, params, batch, loss, partial(muon_step, beta2=0.99), ema=True)
    return per_step(lambda number: step(diffusion.draw_batch(schedule, images, rng), number), ranks)


def vae_trainer(ranks, batch, rng):
    init, encode, decode = vae.VAES["mlp"]

    def loss(params, batch):
        return vae.negative_elbo(partial(encode, params), partial(decode, params), batch)

    return trainer(ranks, init(rng, 20), batch, loss, adam_step, ema=False)


def vae_steps(batch=VAE_BATCH, cores=CORES):
    rng = np.random.default_rng(0)
    ranks = Ranks(cores)
    x = scale(train_images(batch), 0, 1)
    step = vae_trainer(ranks, batch, rng)
    eps = rng.standard_normal((batch, 20), dtype=np.float32)
    return per_step(lambda number: step((x, eps), number), ranks, 30)


def epoch(count):
    rng = np.random.default_rng(0)
    ranks = Ranks(CORES)
    images = train_images(count)
    step = vae_trainer(ranks, VAE_BATCH, rng)
    with ranks:
        start = time.perf_counter()
        for number, batch in enumerate(minibatches(images, VAE_BATCH, rng), 1):
            step((scale(batch, 0, 1), rng.standard_normal((len(batch), 20), dtype=np.float32)), number)
        return 1e3 * (time.perf_counter() - start), peak(ranks)


def sampling(T):
    rng = np.random.default_rng(0)
    ranks = Ranks(CORES)
    schedule = diffusion.make_schedule("linear", T)
    params, denoiser = default_unet(schedule, rng)
    sharded_x_0 = in_parallel(partial(denoiser.x_0, params), SAMPLE_SHARD, ranks)
    x_T = rng.standard_normal((SAMPLES, 28, 28, 1), dtype=np.float32)
    with ranks:
        start = time.perf_counter()
        for _ in samplers.sample(sharded_x_0, schedule, x_T, rng):
            pass
        return 1e3 * (time.perf_counter() - start), peak(ranks)


def measure(name, value):
    """(ms, MiB) of one measurement, made in a process of its own."""
    return MEASUREMENTS[name][3](value)


def draw(results):
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for place, (name, rows) in enumerate(results.items(), 1):
        axes = figure.add_subplot(2, 3, place)
        what, values, job, _ = MEASUREMENTS[name]
        times, memory = zip(*rows, strict=True)
        axes.plot(values, times, "o-", label="measured")
        ideal = [times[0] / v if what == "cores" else times[-1] * v / values[-1] for v in values]
        axes.plot(values, ideal, "k:", lw=1, label="in proportion")
        axes.set(title=name, xlabel=what, ylabel=f"ms for {job}", ylim=(0, None))
        other = axes.twinx()
        other.plot(values, memory, "s--", color="tab:grey", ms=4)
        other.set_ylim(0, max(1024, *memory))
        other.set_ylabel("peak memory in MiB (dashed)", color="tab:grey")
        axes.legend(loc="upper right" if what == "cores" else "upper left")
        axes.set_xticks(values if what == "cores" else axes.get_xticks()[1:-1:2])
    return figure


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of every measurement (default: 3)")
    parser.add_argument("--figure", type=Path, default=Path("scaling.png"), help="(default: scaling.png)")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("at least one round")
    return args


def main():
    args = parse_arguments()
    jobs = [(name, value) for name in MEASUREMENTS for value in MEASUREMENTS[name][1]]
    found = {job: [] for job in jobs}
    for name, value in tqdm(jobs * args.rounds, disable=not sys.stderr.isatty()):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            found[name, value].append(fresh.submit(measure, name, value).result())
    results = {}
    print(f"{os.cpu_count()} processors, {CORES} used; NumPy {np.__version__}")
    for name, (what, values, job, _) in MEASUREMENTS.items():
        rows = [tuple(map(statistics.median, zip(*found[name, value], strict=True))) for value in values]
        results[name] = rows
        each = "times one" if what == "cores" else "ms each"
        print(f"\n{name}\n{what:>16}{'ms for ' + job:>24}{each:>12}{'peak MiB':>10}")
        for value, (taken, mib) in zip(values, rows, strict=True):
            ratio = rows[0][0] / taken if what == "cores" else taken / value
            print(f"{value:16,}{taken:24,.1f}{ratio:12.3f}{mib:10.0f}")
    plots.save(draw(results), args.figure)


if __name__ == "__main__":
    main()
