"""Run run_ddpm.py or scratchgen.evaluate with a network that predicts x_0.

examples:
  python docs/predict_x_0.py run_ddpm --additions weights --out runs/x_0
  python docs/predict_x_0.py scratchgen.evaluate runs/x_0 --frechet 10000

Two methods of `improved.Denoiser` and the weights of the loss are replaced; all
else is as it was. The loss is the mean squared error of x_0, and needs
--additions weights. This is one row of docs/ablation.py, and an example of how
to try another parametrisation.
"""

import argparse
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # where run_ddpm.py is

from scratchgen import improved  # noqa: E402  (before NumPy: sets NumPy's threads)
from scratchgen.diffusion import at  # noqa: E402
from scratchgen.machinery import cli  # noqa: E402


def eps(self, params, x_t, t, groups=None):
    """The noise that leads from the predicted x_0 to x_t, by Eq. (4)."""
    x_0 = self.output(params, x_t, t, groups)
    return (x_t - at(self.schedule["sqrt_alpha_bar"], t) * x_0) / at(self.schedule["sqrt_one_minus_alpha_bar"], t)


def x_0(self, params, x_t, t, groups=None):
    """The output of the network."""
    return self.output(params, x_t, t, groups)


def step_weights(schedule):
    """(1 - alpha_bar_t) / alpha_bar_t: the squared error of eps, times that, is the squared error of x_0."""
    noise, signal = schedule["sqrt_one_minus_alpha_bar"], schedule["sqrt_alpha_bar"]
    return (noise / signal) ** 2


def main(argv=None):
    parser = cli.OneLineParser("docs/predict_x_0.py", __doc__)
    parser.add_argument("program", choices=["run_ddpm", "scratchgen.evaluate"])
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="those of this program")
    args = parser.parse_args(argv)
    improved.Denoiser.eps, improved.Denoiser.x_0, improved.step_weights = eps, x_0, step_weights
    sys.argv = [args.program, *args.flags]
    runpy.run_module(args.program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()  # whose program reports errors itself
