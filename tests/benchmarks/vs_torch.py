"""scratchgen against PyTorch on the same cores: the same networks, weights, batches and noise.

    pip install -e ".[bench]"
    python tests/benchmarks/vs_torch.py

First each pair must agree in the loss, every gradient and the loss after some optimiser steps, or in the sampled
images. Only then are both timed, in turns, so that other load on the machine affects both alike. PyTorch runs eagerly
with its fused Adam, once in its default layout (NCHW) and once in channels_last; its best is the faster of the two.
Further columns, also in the faster layout: torch.compile, which takes 5 to 35 seconds before its first step, and
torch.compile with bfloat16 autocast, whose products have 8 bits of precision (NumPy has none). Rows with Muon use the
run scripts' default optimiser for these networks. PyTorch's own Muon rejects convolution kernels and rounds to 16 bits,
so Muon is written here once more, in PyTorch. scratchgen tells the C library to keep freed memory; in this process this
holds for PyTorch too.

The machine's limit is the time of the matrix products and convolutions alone, at the rate of a large float32 matrix
product of NumPy on all cores, measured in the same run. PyTorch's own counter counts their operations.
"""

import argparse
import itertools
import json
import math
import operator
import os
import statistics
import sys
import time
from functools import partial, reduce
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))  # the run scripts
environment = dict(os.environ)

import run_ddpm
from scratchgen import denoisers, diffusion, improved, muon, ops, samplers, tree, vae
from scratchgen.layers import GROUPS, time_embedding
from scratchgen.machinery import blas, files
from scratchgen.machinery.parallel import Ranks, images_of, in_parallel, shard_size, sharded, shards
from scratchgen.muon import muon_step
from scratchgen.optim import adam_step, ema_step, flush_denormals, init_moments
from scratchgen.trained import SHARD as SAMPLE_SHARD

import numpy as np
from tqdm import tqdm

os.environ.clear()
os.environ.update(environment)  # scratchgen asked for one BLAS thread a worker; PyTorch shall not hear of it

try:
    import torch
except ImportError:
    sys.exit('vs_torch.py needs PyTorch to compare with: pip install -e ".[bench]"')
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# (H = W, C, O) of the 3x3 convolutions of both networks.
CONVOLUTIONS = [(14, 64, 32), (14, 32, 32), (7, 64, 64), (14, 40, 4), (14, 8, 32)]
UNET_BATCH, VAE_BATCH = 64, 128
CALLS = 10  # of a convolution in each time measurement
T, LATENT_DIM, LR, BETA2, EMA = 200, 20, 1e-3, 0.99, 0.998

# --------------------------------------------------------------------------------- the same networks, PyTorch's idiom
# p maps names as in tree.names(params) to tensors. Weights are laid out as PyTorch likes them best: see `exchange`.


def norm(p, name, h):
    return F.group_norm(h, GROUPS, p[name + "/scale"], p[name + "/shift"])


def conv(p, name, h):
    return F.conv2d(h, p[name + "/w"], p[name + "/b"], padding="same")


def pointwise(p, name, h):  # a dense layer at each position, or a strided one where its kernel is 2x2
    w = p[name + "/w"]
    return F.conv2d(h, w, p[name + "/b"], stride=w.shape[-1])


def linear(p, name, h):
    return F.linear(h, p[name + "/w"], p[name + "/b"])


def res_block(p, name, x, time):
    h = conv(p, name + "/conv1", F.silu(norm(p, name + "/norm1", x)))
    scale = 1 + linear(p, name + "/time_scale", time)[..., None, None]
    shift = linear(p, name + "/time_shift", time)[..., None, None]
    h = conv(p, name + "/conv2", F.silu(torch.addcmul(shift, F.group_norm(h, GROUPS), scale)))
    return h + (pointwise(p, name + "/shortcut", x) if name + "/shortcut/w" in p else x)


def global_block(p, name, x, time):
    h = pointwise(p, name + "/squeeze", F.silu(norm(p, name + "/norm", x)))
    flat = h.flatten(1) if p["layout"] == "NCHW" else h.permute(0, 2, 3, 1).flatten(1)  # as it lies in memory
    units = linear(p, name + "/mix_in", flat)
    scale = 1 + linear(p, name + "/time_scale", time)
    shift = linear(p, name + "/time_shift", time)
    back = linear(p, name + "/mix_out", F.silu(torch.addcmul(shift, units, scale)))
    back = (
        back.reshape(h.shape)
        if p["layout"] == "NCHW"
        else back.reshape(-1, *h.shape[2:], h.shape[1]).permute(0, 3, 1, 2)
    )
    return x + pointwise(p, name + "/expand", back)


def unet(p, x, t):
    time = torch.from_numpy(time_embedding(t, denoisers.TIME_WIDTH))
    for i in range(2):
        time = F.silu(linear(p, f"time/{i}", time))
    # pixel_unshuffle orders by channel, then position; `space_to_depth`, and so the weights, by position, then channel.
    patches = F.pixel_unshuffle(x, 2).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
    skip = global_block(p, "global_down/0", res_block(p, "down_blocks/0", conv(p, "conv_in", patches), time), time)
    h = pointwise(p, "down", skip)
    for i in range(2):
        h = res_block(p, f"middle_blocks/{i}", h, time)
        for j in range(2):
            h = global_block(p, f"global_middle/{i}/{j}", h, time)
    h = F.pixel_shuffle(pointwise(p, "up", h), 2)
    h = res_block(p, "up_blocks/0", torch.cat([h, skip], dim=1), time)
    h = F.silu(norm(p, "norm_out", h))
    return F.pixel_shuffle(conv(p, "conv_out", torch.cat([h, patches], dim=1)), 2)


def predict_v(p, signal, noise, x_t, t):
    return unet(p, torch.cat([x_t, ((x_t + signal) / noise).clamp(-3, 3)], dim=1), t)


def weighted_loss(p, batch):
    x_0, t, eps, signal, noise = batch
    x_t = signal * x_0 + noise * eps
    return ((signal * predict_v(p, signal, noise, x_t, t) + noise * x_t - eps) ** 2 / signal).mean()


def negative_elbo(encode, decode, p, batch):
    x, eps = batch
    mu, log_var = encode(p, x)
    logits = decode(p, mu + torch.exp(0.5 * log_var) * eps)
    reconstruction = -F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    kl = 0.5 * (mu**2 + torch.exp(log_var) - 1 - log_var).sum()
    return (kl - reconstruction) / len(x)


def mlp_encode(p, x):
    h = F.relu(linear(p, "encoder/1", F.relu(linear(p, "encoder/0", x.flatten(1)))))
    return linear(p, "mu", h), linear(p, "log_var", h).clamp(max=vae.MAX_LOG_VAR)


def mlp_decode(p, z):
    h = F.relu(linear(p, "decoder/1", F.relu(linear(p, "decoder/0", z))))
    return linear(p, "decoder/2", h).reshape(-1, 1, 28, 28)


def conv_encode(p, x):
    h = F.relu(conv(p, "encoder/conv14", F.pixel_unshuffle(x, 2)))
    h = F.relu(pointwise(p, "encoder/down", h))
    h = F.relu(conv(p, "encoder/conv7", h))
    h = h.flatten(1) if p["layout"] == "NCHW" else h.permute(0, 2, 3, 1).flatten(1)  # as it lies in memory
    h = F.relu(linear(p, "encoder/hidden", h))
    return linear(p, "mu", h), linear(p, "log_var", h).clamp(max=vae.MAX_LOG_VAR)


def conv_decode(p, z):
    h = F.relu(linear(p, "decoder/spread", F.relu(linear(p, "decoder/hidden", z))))
    h = h.reshape(-1, 64, 7, 7) if p["layout"] == "NCHW" else h.reshape(-1, 7, 7, 64).permute(0, 3, 1, 2)
    h = F.relu(conv(p, "decoder/conv7", h))
    h = F.relu(F.pixel_shuffle(pointwise(p, "decoder/up", h), 2))
    h = F.relu(conv(p, "decoder/conv14", h))
    return F.pixel_shuffle(pointwise(p, "decoder/pixels", h), 2)


def swap(array, axis, *sizes):
    """Read ``axis`` as (sizes[0], sizes[1]) and exchange the two."""
    shape = array.shape
    split = array.reshape(*shape[:axis], *sizes, *shape[axis + 1 :])
    return split.swapaxes(axis, axis + 1).reshape(shape)


def exchange(name, array, layout):
    """Our weight or bias (or its gradient) in PyTorch's layout: dense layers (O, C), kernels (O, C, K, K).

    Dense layers at each position, or of 2x2 patches, become kernels too. Channels are ordered (p, p, C) here, (C, p, p)
    in pixel_shuffle. A flattened image is (C, H, W) in NCHW.
    """
    layer, last = name.split("/")[-2:]
    weight = last == "w"
    if layer in ("up", "pixels"):
        array = swap(array, array.ndim - 1, 4, -1)
    if layer == "spread" and layout == "NCHW":
        array = swap(array, array.ndim - 1, 49, 64)
    if layer == "hidden" and weight and len(array) == 49 * 64 and layout == "NCHW":
        array = swap(array, 0, 49, 64)
    if layout == "NCHW" and (layer == "mix_out" or (layer == "mix_in" and weight)):
        array = swap(array, 0 if layer == "mix_in" else array.ndim - 1, *((196, 4) if "down" in name else (49, 16)))
    if not weight:
        return array
    if layer == "down":
        array = array.reshape(2, 2, -1, array.shape[-1])
    if layer in ("up", "pixels", "shortcut", "squeeze", "expand"):
        array = array[None, None]
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


class Peer:
    """PyTorch's copy of a parameter tree in one layout, with what its training step needs."""

    def __init__(self, params, layout, loss, batch, muon=False, bfloat16=False):
        self.names = tree.names(params)
        self.loss = loss
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)
        self.batch = [tensor(array, layout) for array in batch]
        self.p = {
            name: tensor(exchange(name, leaf, layout), layout).requires_grad_()
            for name, leaf in zip(self.names, tree.leaves(params), strict=True)
        }
        self.weights = list(self.p.values())
        self.p["layout"] = layout
        self.ema = [weight.detach().clone() for weight in self.weights]
        is_muons = [muon and is_stepped_by_muon(leaf) for leaf in tree.leaves(params)]
        self.of_muon = [(w, torch.zeros_like(w)) for w, is_muon in zip(self.weights, is_muons, strict=True) if is_muon]
        of_adam = [w for w, is_muon in zip(self.weights, is_muons, strict=True) if not is_muon]
        self.adam = torch.optim.Adam(of_adam, lr=LR, betas=(0.9, BETA2), fused=True)

    def value_and_grad(self):
        for weight in self.weights:
            weight.grad = None
        with self.autocast:
            loss = self.loss(self.p, self.batch)
        loss.backward()
        return loss

    def step(self, ema=False):
        loss = self.value_and_grad()
        self.adam.step()
        with torch.no_grad():
            for weight, momentum in self.of_muon:
                momentum.mul_(0.95).add_(weight.grad)
                direction = orthogonalise((weight.grad + 0.95 * momentum).flatten(1))
                weight.sub_(direction.reshape(weight.shape), alpha=LR * 0.2 * math.sqrt(max(direction.shape)))
            if ema:
                torch._foreach_lerp_(self.ema, self.weights, 1 - EMA)
        return loss.item()


def is_stepped_by_muon(leaf):
    return leaf.ndim >= 2 and min(leaf.size // leaf.shape[-1], leaf.shape[-1]) in muon.MUON_SIDES


def orthogonalise(G):
    """`muon.orthogonalise` in PyTorch. Here a kernel's matrix is ours transposed, with rows and columns reordered."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.T if len(G) > G.shape[1] else G
    X = X / (X.norm() + 1e-7)
    S = X @ X.T
    product = torch.eye(len(X))
    for _ in range(5):
        P = b * S + c * S @ S
        P.diagonal().add_(a)
        S = P @ S @ P
        product = P @ product
    X = product @ X
    return X.T if len(G) > G.shape[1] else X


def tensor(array, layout):
    """A copy of the array; images (N, C, H, W) and kernels (O, C, K, K) in the memory order of ``layout``."""
    copy = torch.tensor(np.ascontiguousarray(array))
    return copy.contiguous(memory_format=LAYOUTS[layout]) if copy.ndim == 4 else copy


def image(array, layout):  # (N, H, W, C) -> (N, C, H, W)
    return tensor(array.transpose(0, 3, 1, 2), layout)


# ------------------------------------------------------------------------------------------------ ours, and both agree


def assert_close(name, ours, theirs, tolerance):
    """Assert: largest difference <= ``tolerance`` times largest number."""
    ours = np.asarray(ours)
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape and ours.dtype == np.float32, (name, ours.shape, theirs.shape, ours.dtype)
    difference = np.abs(ours - theirs).max()
    size = np.abs(theirs).max()
    assert size > 0 and difference <= tolerance * size, f"{name}: differs by {difference:.2e}, largest {size:.2e}"


def randomised(params, rng):
    """Add noise to each parameter: some layers start at zero, and every gradient behind them would be zero."""
    return tree.map(lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape, dtype=np.float32), params)


def training(params, loss, batch, shard_size, ranks, peer_loss, peer_batch, muon, ema=False, layouts=LAYOUTS):
    """Our training step and the peers' as functions without arguments, after a check that they agree."""
    arrays = ranks.share({"params": params, "ema": tree.map(np.copy, params), "moments": init_moments(params)})
    params = arrays["params"]
    value_and_grad = sharded(loss, ranks, params, shard_size, len(batch[0]))
    peers = {layout: Peer(params, layout, peer_loss, peer_batch(layout), muon) for layout in layouts}
    value, _, gradient = value_and_grad(params, batch)
    for layout, peer in peers.items():
        assert_close(f"loss, {layout}", value, np.float32(peer.value_and_grad().item()), 1e-5)
        for name, leaf in zip(peer.names, tree.leaves(gradient), strict=True):
            assert_close(f"{name}, {layout}", exchange(name, leaf, layout), peer.p[name].grad.numpy(), 1e-3)

    steps = itertools.count(1)

    def step():
        value, _, gradient = value_and_grad(params, batch)
        count = next(steps)
        if count % 100 == 0:
            flush_denormals(ranks.own(arrays["moments"]))
        optimiser_step = muon_step if muon else adam_step
        optimiser_step(params, gradient, arrays["moments"], count, LR, beta2=BETA2)
        if ema:
            ema_step(ranks.own(arrays["ema"]), params, count + 10_000, EMA)
        ranks.from_owners(params)
        ranks.broadcast((None, False))  # as `Run` asks whether to stop or to save
        return value

    for _ in range(3):
        ours = step()
        for layout, peer in peers.items():
            assert_close(f"loss after a step, {layout}", ours, np.float32(peer.step(ema)), 1e-3)
    value, _, _ = value_and_grad(params, batch)
    for kind, autocast in (("compiled", False), ("bfloat16", True)):
        for layout in layouts:
            peer = Peer(params, layout, torch.compile(peer_loss, dynamic=False), peer_batch(layout), muon, autocast)
            assert_close(f"loss, {kind}", value, np.float32(peer.value_and_grad().item()), 0.05 if autocast else 1e-3)
            peers[f"{kind} {layout}"] = peer
    return step, {name: partial(peer.step, ema) for name, peer in peers.items()}


def vae_step(arch, layouts, muon, ranks, rng):
    init, encode, decode = vae.VAES[arch]
    peer_encode, peer_decode = {"mlp": (mlp_encode, mlp_decode), "conv": (conv_encode, conv_decode)}[arch]
    x = rng.random((VAE_BATCH, 28, 28, 1), dtype=np.float32)
    eps = rng.standard_normal((len(x), LATENT_DIM), dtype=np.float32)

    def loss(params, batch):
        return vae.negative_elbo(partial(encode, params), partial(decode, params), batch)

    return training(
        randomised(init(rng, LATENT_DIM), rng),
        loss,
        (x, eps),
        shard_size(VAE_BATCH, ranks.processes),
        ranks,
        partial(negative_elbo, peer_encode, peer_decode),
        lambda layout: (image(x, layout), eps),
        muon,
        layouts=layouts,
    )


def unet_case(rng):
    schedule = diffusion.make_schedule("linear", T)
    additions = [name for name in improved.ADDITIONS if name != "groups"]  # a third channel costs next to nothing
    params = randomised(improved.init_denoiser(denoisers.init_unet, rng, additions), rng)
    x_0 = rng.uniform(-1, 1, (UNET_BATCH, 28, 28, 1)).astype(np.float32)
    batch = diffusion.draw_batch(schedule, x_0, rng)
    return schedule, params, batch, improved.Denoiser(denoisers.unet, schedule, additions)


def unet_step(muon, ranks, rng):
    schedule, params, (x_0, t, eps), denoiser = unet_case(rng)
    weights = improved.step_weights(schedule)

    def loss(params, batch):
        return diffusion.simple_loss(partial(denoiser.eps, params), schedule, batch, weights)

    signal = diffusion.at(schedule["sqrt_alpha_bar"], t)
    noise = diffusion.at(schedule["sqrt_one_minus_alpha_bar"], t)
    return training(
        params,
        loss,
        (x_0, t, eps),
        shard_size(UNET_BATCH, ranks.processes),
        ranks,
        weighted_loss,
        lambda layout: (image(x_0, layout), t, image(eps, layout), signal, noise),
        muon,
        ema=True,
    )


def unet_sampling(ranks, rng):
    schedule, params, (x_t, _, fresh), denoiser = unet_case(rng)
    sharded_x_0 = in_parallel(partial(denoiser.x_0, params), SAMPLE_SHARD, ranks)
    t = T // 2  # where sampling starts
    given = SimpleNamespace(standard_normal=lambda *shape, **dtype: fresh)  # in place of rng: both add the same noise

    def ours():
        return next(samplers.sample(sharded_x_0, schedule, x_t, given, start=t))[1]

    def theirs(layout, predict=predict_v):
        peer = Peer(params, layout, None, (image(x_t, layout), image(fresh, layout)))
        x, extra = peer.batch
        times = torch.full((len(x),), t)
        constant = {name: float(values[t]) for name, values in schedule.items() if name != "T"}
        signal = constant["sqrt_alpha_bar"]
        noise = constant["sqrt_one_minus_alpha_bar"]

        @torch.inference_mode()
        def step():  # Algorithm 2
            x_0 = signal * x - noise * predict(peer.p, signal, noise, x, times)
            mean = constant["posterior_x_0"] * x_0 + constant["posterior_x_t"] * x
            return mean.add_(extra, alpha=constant["posterior_variance"] ** 0.5)

        assert_close(f"sampled images, {layout}", ours().transpose(0, 3, 1, 2), step().numpy(), 1e-4)
        return step

    compiled = torch.compile(predict_v, dynamic=False)
    peers = {layout: theirs(layout) for layout in LAYOUTS}
    return ours, peers | {f"compiled {layout}": theirs(layout, compiled) for layout in LAYOUTS}


def conv2d(shape, backward, ranks, rng):
    """One convolution's forward pass, or its three gradients, several times: as in a network, each rank has its images
    and keeps them. The ranks meet once, after all calls, and then add their gradients of the kernel."""
    size, C, O = shape
    x = rng.standard_normal((UNET_BATCH, size, size, C), dtype=np.float32)
    k = rng.standard_normal((3, 3, C, O), dtype=np.float32) * 0.1
    b = rng.standard_normal(O, dtype=np.float32)
    g = rng.standard_normal((*x.shape[:3], O), dtype=np.float32)

    def gradients(vjp, g):
        dx, dk, db = vjp(g)
        return dx(), dk, db

    def one_shard(shard):
        x, g, vjp = shard
        for _ in range(CALLS):
            result = gradients(vjp, g) if backward else ops.conv2d(x, k, b)
        return result[1:] if backward else None

    parts = [images_of((x, g), images) for images in shards(UNET_BATCH, run_ddpm.SHARD)]
    parts = [(x, g, ops.conv2d.__wrapped__(x, k, b)[1]) for x, g in parts]

    def ours():
        results = ranks.map(one_shard, parts)
        if backward:
            reduce(partial(tree.map, operator.add), results)

    def theirs(layout):
        arguments = [image(x, layout), tensor(k.transpose(3, 2, 0, 1), layout), torch.tensor(b)]
        gradient = image(g, layout)
        if backward:
            y = F.conv2d(*(argument.requires_grad_() for argument in arguments), padding="same")
            call = partial(torch.autograd.grad, y, arguments, gradient, retain_graph=True)
            mine = gradients(ops.conv2d.__wrapped__(x, k, b)[1], g)
            agree = zip(mine, [(0, 3, 1, 2), (3, 2, 0, 1), (0,)], call(), strict=True)
        else:
            call = torch.inference_mode()(partial(F.conv2d, *arguments, padding="same"))
            agree = [(ops.conv2d(x, k, b), (0, 3, 1, 2), call())]
        for mine, order, other in agree:
            assert_close(f"convolution, {layout}", mine.transpose(order), other.numpy(), 1e-4)
        return lambda: [call() for _ in range(CALLS)]

    return ours, {layout: theirs(layout) for layout in LAYOUTS}


CASES = {
    "vae_mlp_step": partial(vae_step, "mlp", ["NCHW"], False),  # no images inside: one layout
    "vae_conv_step": partial(vae_step, "conv", list(LAYOUTS), False),
    "vae_conv_step_muon": partial(vae_step, "conv", list(LAYOUTS), True),
    "unet_step": partial(unet_step, False),
    "unet_step_muon": partial(unet_step, True),
    "unet_sampling": unet_sampling,
}
for shape in CONVOLUTIONS:
    for backward in (False, True):
        name = "conv2d_{0}x{0}_{1}_{2}".format(*shape) + ("_backward" if backward else "_forward")
        CASES[name] = partial(conv2d, shape, backward)

# --------------------------------------------------------------------------------------------------- timing, the table


def seconds(f, repeats):
    start = time.perf_counter()
    f(repeats)
    return (time.perf_counter() - start) / repeats


def repeated(f):
    def repeat(count):
        for _ in range(count):
            f()

    return repeat


def together(f, number, ranks):
    """`repeated` for what all ranks do together: rank 0 calls it, the others `follow`."""

    def repeat(count):
        ranks.broadcast((number, count))
        repeated(f)(count)

    return repeat


def follow(functions, ranks):
    """What the other ranks do until rank 0 sends (None, 0)."""
    while (order := ranks.broadcast(None))[1]:
        number, count = order
        repeated(functions[number])(count)


def medians(functions, rounds, progress):
    """Median seconds per call of each function, in turns: A B C A B C ...; short ones get several calls."""
    repeats = []
    for f in functions:
        f(1)
        repeats.append(max(1, round(0.03 / seconds(f, 1))))
    times = [[] for _ in functions]
    for _ in range(rounds):
        for f, count, taken in zip(functions, repeats, times, strict=True):
            f(1)  # untimed: now the caches hold this one's data, and the other one's threads have gone to sleep
            taken.append(seconds(f, count))
        progress.update()
    return [statistics.median(taken) for taken in times]


PRODUCT = 1024  # rows and columns of a large float32 matrix product


def operations(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="turns of each (default: 21)")
    parser.add_argument("--workers", type=int, default=blas.available_cores(), help="cores for both (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows with this prefix")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, too")
    args = parser.parse_args()
    if not any(name.startswith(args.only) for name in CASES):
        parser.error(f"no row begins with {args.only}; there are {', '.join(CASES)}")
    if args.rounds < 1 or not 1 <= args.workers <= blas.available_cores():
        parser.error(f"at least one round, and from 1 to {blas.available_cores()} workers")
    return args


def main():
    args = parse_arguments()
    cases = {name: case for name, case in CASES.items() if name.startswith(args.only)}
    torch.set_num_threads(args.workers)
    square = np.ones((PRODUCT, PRODUCT), np.float32)
    products_count = args.workers * 2 * PRODUCT**3
    rows = []
    rates = []
    with tqdm(total=args.rounds * len(cases), unit=" rounds", disable=not sys.stderr.isatty()) as progress:
        for name, case in cases.items():
            progress.set_description(name)
            ranks = Ranks(args.workers)
            step, peers = case(ranks, np.random.default_rng(0))
            with ranks:
                functions = [lambda: square @ square, step]
                if ranks.rank:
                    follow(functions, ranks)
                else:
                    functions = [together(f, number, ranks) for number, f in enumerate(functions)]
                    times = medians([*functions, *map(repeated, peers.values())], args.rounds, progress)
                    ranks.broadcast((None, 0))
            calls = CALLS if name.startswith("conv2d") else 1
            taken, mine, *others = (1e3 * each for each in times)
            limit = operations(next(iter(peers.values()))) / products_count * taken
            rates.append(products_count / taken / 1e6)
            theirs = {peer: ms / calls for peer, ms in zip(peers, others, strict=True)}
            kinds = {
                kind: min((ms for peer, ms in theirs.items() if peer.startswith(begin)), default=math.nan)
                for kind, begin in (("torch_best", tuple(LAYOUTS)), ("compiled", "compiled"), ("bfloat16", "bfloat16"))
            }
            row = {"name": name, "ours_ms": mine / calls} | {f"{kind}_ms": ms for kind, ms in kinds.items()}
            row["torch_default_ms"] = theirs["NCHW"]
            row["ratio_best"] = row["ours_ms"] / row["torch_best_ms"]
            row["limit_share"] = limit / mine
            rows.append(row)
    versions = f"NumPy {np.__version__}, torch {torch.__version__}"
    print(f"{args.workers} cores, {statistics.median(rates):.0f} GFLOP/s, {versions}; times in ms")
    heads = ("ours", "torch best", "/ best", "default", "compiled", "bfloat16", "of limit")
    print(f"{'':28}" + "".join(f"{head:>12}" for head in heads))
    for row in rows:
        names = ("ours_ms", "torch_best_ms", "ratio_best", "torch_default_ms", "compiled_ms", "bfloat16_ms")
        numbers = "".join(f"{row[name]:12.2f}" for name in names).replace("nan", "  -")
        print(f"{row['name']:28}{numbers}{row['limit_share']:12.0%}")
    if args.json:
        files.write_text(args.json, json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
