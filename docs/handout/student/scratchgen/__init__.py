"""A variational autoencoder and a diffusion model of FashionMNIST, from scratch in NumPy: the homework.

To write: functions of `vae.py`, `diffusion.py` and `plots.py`. All else is there: layers, gradients, Adam, the data.
"""

from scratchgen.machinery import blas  # before all others, since it must act before NumPy is loaded
