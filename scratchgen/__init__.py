"""scratchgen: a variational autoencoder and a diffusion model of FashionMNIST, from scratch in NumPy.

README.md has the order in which to read these files. What one reads stands at the top of this package; what one need
not read stands in two wings, ``machinery`` and ``evaluate``.
"""

from scratchgen.machinery import runtime  # noqa: F401  first of all: it must act before NumPy is loaded
