"""scratchgen: two generative models on FashionMNIST, from scratch in NumPy.

Reading order, each file in one sitting and no jump back up:

1.  ``ops.py``          the primitives, each with its vector-Jacobian product (VJP) beneath it
2.  ``layers.py``       dense, convolution, residual block: ``init_x`` makes parameters, ``x`` applies them
3.  ``vae.py``          encoder, decoder and the evidence lower bound
4.  ``diffusion.py``    the noising process q, the reverse process p, loss and sampler; knows no network
5.  ``denoisers.py``    the networks eps_theta(x_t, t): an MLP and a U-Net
6.  ``gradients.py``    reverse-mode differentiation over a tree of parameters, and in parallel over shards
7.  ``optim.py``        Adam, the learning-rate schedule, the moving average of the weights

and, to look up when needed: ``data.py`` (idx files, minibatches), ``tree.py`` (nested dicts and lists of
arrays), ``checkpoint.py`` (files that survive a crash), ``plots.py`` (every figure), ``cli.py`` (what the two
run scripts share at the command line) and ``runtime.py`` (threads and memory).
"""

from scratchgen import runtime  # noqa: F401  first of all: it must act before NumPy is loaded
