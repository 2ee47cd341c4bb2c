"""Train the two models of scratchgen/micro.py and measure their samples, as
`python -m scratchgen.evaluate` measures those of the package.

    python docs/measure_micro.py

It prints the distances that docs/quality.md has, and the time of both
trainings. Nine minutes on two cores.
"""

import argparse
import importlib.util
import time
from pathlib import Path

import numpy as np  # before scratchgen, which would set one BLAS thread: micro.py has more

ROOT = Path(__file__).resolve().parent.parent
N, DRAWS = 10_000, 3


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser("docs/measure_micro.py", description=__doc__, formatter_class=formatter).parse_args(argv)
    spec = importlib.util.spec_from_file_location("micro", ROOT / "scratchgen" / "micro.py")
    micro = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(micro)
    start = time.perf_counter()
    decoder, network = micro.main(ROOT / "data")
    seconds = time.perf_counter() - start

    from scratchgen.data import load_fashion_mnist
    from scratchgen.evaluate import classifier
    from scratchgen.evaluate.reports import SHARD, sample_metrics

    params = classifier.load_classifier()

    def features(x):  # (N, 784) in [0, 1] -> (N, F)
        x = np.float32(x).reshape(-1, 28, 28, 1)
        return np.concatenate([classifier.features(params, x[i : i + SHARD]) for i in range(0, len(x), SHARD)])

    def vae():
        return micro.sigmoid(micro.mlp(decoder, micro.rng.standard_normal((N, micro.D), np.float32))[0])

    def ddpm():
        drawn = [micro.sample(network, 500) for _ in range(N // 500)]  # 500 at a time: large arrays are slower
        return np.clip((np.concatenate(drawn) + 1) / 2, 0, 1)

    real = features(load_fashion_mnist(ROOT / "data", labels=False)["test_images"] / 255)
    print(f"both models trained, and 128 images drawn, in {seconds:.0f} s")
    for name, draw in {"VAE": vae, "DDPM": ddpm}.items():
        measured = []
        for seed in range(DRAWS):
            micro.rng = np.random.default_rng(seed)
            measured.append(sample_metrics(features(draw()), real, params))
        distance, precision, recall = ([one[key] for one in measured] for key in ("distance", "precision", "recall"))
        print(
            f"| {name} of `python scratchgen/micro.py` | {np.mean(distance):.1f} +- {np.std(distance, ddof=1):.1f}",
            end="",
        )
        print(f" | {np.mean(precision):.3f} | {np.mean(recall):.3f} |")


if __name__ == "__main__":
    main()
