"""scratchgen: two generative models on FashionMNIST, from scratch in NumPy.

Reading order, each file in one sitting:

0.  ``run_vae.py``      beside this package: the whole of a training run, in plain sight
1.  ``vae.py``          the evidence lower bound; encoder and decoder
2.  ``layers.py``       dense, convolution, residual block: ``init_x`` makes parameters, ``x`` applies them
3.  ``ops.py``          the primitives, each with its vector-Jacobian product (VJP) beneath it
4.  ``gradients.py``    reverse-mode differentiation over a tree of parameters, and in parallel over shards
5.  ``optim.py``        Adam, Muon, the learning-rate schedule, the moving average of the weights
6.  ``diffusion.py``    the noising process q, the reverse process p, loss, samplers; knows no network
7.  ``denoisers.py``    the networks behind eps_theta(x_t, t): a U-Net and an MLP
8.  ``metrics.py``      how good is it? with ``classifier.py``, and ``evaluate.py`` with ``measurements.py``, which
                        measure a finished run

and, to look up when needed: ``data.py`` (idx files, minibatches), ``tree.py`` (nested dicts and lists of
arrays), ``checkpoint.py`` (files that survive a crash), ``plots.py`` (every figure), ``cli.py`` (what all
programs share at the command line) and ``runtime.py`` with ``processes.py`` (memory, workers).
"""

from scratchgen import runtime  # noqa: F401  first of all: it must act before NumPy is loaded
