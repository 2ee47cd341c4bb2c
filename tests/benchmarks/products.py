"""The speed of the matrix products of a training shard, both whole and in the tiles of `blas.product`.

    python tests/benchmarks/products.py

Medians over turns, on one core, in float32, with operands in the cache. Products are cut only if OpenBLAS has kernels
that do not pack (AVX-512); elsewhere this shows the cost of tiles.
"""

import argparse
import statistics
import sys
import time

from scratchgen import ops
from scratchgen.machinery import blas

import numpy as np
from tqdm import tqdm

# (H = W, C, O) of 3x3 convolutions of 32 images, and (rows, C, O) of dense layers, of the U-Net and of both VAEs.
CONVOLUTIONS = [(14, 64, 32), (14, 32, 32), (7, 64, 64), (14, 40, 4), (14, 8, 32)]
DENSE = [(6272, 64, 32), (1568, 128, 64), (1568, 64, 16), (32, 784, 256), (32, 256, 784), (32, 128, 128)]
DENSE += [(64, 784, 300), (64, 300, 300), (64, 300, 784), (64, 3136, 256), (64, 256, 3136), (3136, 64, 128)]
N, K = 32, 3


def cases():
    """(name, a, b, out) of each product; a and b have the memory layout of a step."""
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    for H, C, O in CONVOLUTIONS:
        x = random(N, H, H, C)
        g = random(N, H, H, O)
        name = f"convolution {H}x{H}, {C} to {O}"
        y = np.empty_like(g)
        dx = np.empty_like(x)
        yield f"{name}, forward", ops.windows(x, K), random(K * K * C, O), y.reshape(N * H, H, O).swapaxes(0, 1)
        yield f"{name}, dx", ops.windows(g, K), random(K * K * O, C), dx.reshape(N * H, H, C).swapaxes(0, 1)
        yield f"{name}, dk", x.reshape(N * H, H, C).transpose(1, 2, 0), ops.windows(g, K), None
    for M, C, O in DENSE:
        x = random(M, C)
        w = random(C, O)
        g = random(M, O)
        yield f"dense {M} x {C} to {O}, forward", x, w, None
        yield f"dense {M} x {C} to {O}, dx", g, w.T, None
        yield f"dense {M} x {C} to {O}, dw", x.T, g, None


def rate(a, b, out, small_kernels):
    """The GFLOP/s of one product, with or without tiles."""
    blas.SMALL_KERNELS = small_kernels
    blas.tile.cache_clear()
    operations = 2 * a.size * b.shape[-1]
    repeats = 1 + int(2e8 / operations)
    blas.product(a, b, out=out)
    start = time.perf_counter()
    for _ in range(repeats):
        blas.product(a, b, out=out)
    return operations * repeats / (time.perf_counter() - start) / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default: 15)")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("at least one round")
    print(f"{'':42}{'M x K x N':>18}{'whole':>8}{'tiles':>7}   of")
    for name, a, b, out in tqdm(list(cases()), disable=not sys.stderr.isatty()):
        both = zip(*([rate(a, b, out, kind) for kind in (False, True)] for _ in range(args.rounds)), strict=True)
        whole, tiles = map(statistics.median, both)
        M, K = a.shape[-2:]
        N = b.shape[-1]
        copied = M > 512 and b.strides[-1] != b.itemsize
        rows, columns = blas.tile(M, K, N, b.strides[-1] != b.itemsize and not copied)
        tqdm.write(f"{name:42}{f'{M} x {K} x {N}':>18}{whole:8.0f}{tiles:7.0f}   {rows} x {columns}")


if __name__ == "__main__":
    main()
