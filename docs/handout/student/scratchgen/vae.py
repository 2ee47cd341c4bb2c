"""The variational autoencoder: questions 4 and 5. Equations have the numbers of questions.md.

    prior     p(z)     = N(0, I)
    decoder   p(x | z) : pixels are independent, pixel i is 1 with probability sigmoid(logit i)
    encoder   q(z | x) = N(mu(x), diag(exp(log_var(x))))

Dimensions: N images, 28 x 28 pixels, one channel; D latent dimensions. Images x are (N, 28, 28, 1) in [0, 1]. All terms
are in nats per image. Arrays are float32 in training and float64 in the tests: a function returns the dtype of its
arguments. Parameters are dicts and lists of float32 arrays, as the functions of `layers.py` make them.

``np`` is autograd's NumPy, so that gradients are found by themselves. Two things to know: it turns float32 into float64
in ``np.mean``, which is slow in training (`ops.mean` does not), and it cannot follow an array that is changed in place.
"""

import math

from scratchgen.gradients import op  # to write a gradient by hand, as in ops.py; nothing here needs it
from scratchgen.layers import conv, dense, init_conv, init_dense, init_mlp, mlp
from scratchgen.ops import depth_to_space, mean, relu, sigmoid, silu, space_to_depth

import autograd.numpy as np  # NumPy with functions that autograd can record

# ------------------------------------------------------------------------------------------------ question 4: the terms


def reparameterise(mu, log_var, eps):
    """A draw z from q(z | x), made from noise, through which gradients reach mu and log_var.

    mu, log_var: (N, D), the mean and the logarithm of the variance of q(z | x). eps: (N, D), drawn from N(0, I).
    Returns z: (N, D).
    """
    raise NotImplementedError("question 4: write reparameterise")


def kl_per_dimension(mu, log_var):
    """The KL divergence D_KL(q(z_j | x) || p(z_j)) for each latent dimension j.

    mu, log_var: (N, D). Returns (N, D), in nats: not yet summed over the dimensions.
    """
    raise NotImplementedError("question 4: write kl_per_dimension")


def bernoulli_log_likelihood(logits, x):
    """log p(x | z) of each image, the sum over its pixels, in nats.

    logits: (N, ...), the decoder's outputs; x: the same shape, in [0, 1]. Returns (N,). Of a grey pixel x, the
    log-probability of 1 has the weight x and that of 0 the weight 1 - x. Logits of 1000 and -1000 must not overflow,
    nor make minus infinity. The gradient of the logits has to be right, there, too, and at 0; x needs none.
    (`ops.sigmoid` has no gradient: autograd does not record it.)
    """
    raise NotImplementedError("question 4: write bernoulli_log_likelihood")


def elbo_terms(encode, decode, batch):
    """Both terms of Eq. (1) for each image, the first estimated by one draw of z.

    encode: a function of x (N, H, W, 1) that returns the pair (mu, log_var), each (N, D). decode: a function of z
    (N, D) that returns logits (N, H, W, 1); images may have any size here. batch: the pair (x, eps), images and noise
    (N, D) from N(0, I).
    Returns the pair (reconstruction, kl), each (N,): the first term, and the divergence that is subtracted from it.
    """
    raise NotImplementedError("question 4: write elbo_terms")


# --------------------------------------------------------------------------------------------- question 4: the networks
# The architecture is yours, whatever the names say: dense layers or convolutions, how many, how wide. Two hidden layers
# of 300 are enough. `layers.py` has the layers, each as a pair: init_dense makes the parameters, dense applies them.


def init_mlp_vae(rng, latent_dim):
    """The parameters of encoder and decoder, a tree (dicts and lists) of float32 arrays, all drawn from ``rng``.

    rng: a numpy.random.Generator. latent_dim: D. Every array has one dimension or more, and an effect on
    mu, log_var or the logits.
    """
    raise NotImplementedError("question 4: write init_mlp_vae")


def mlp_encode(params, x):
    """The encoder: a network with at least one hidden layer, and two outputs, each with weights of its own.

    params: of `init_mlp_vae`. x: (N, 28, 28, 1) in [0, 1]. Returns the pair (mu, log_var), each (N, D); log_var may be
    negative. The two halves of one last layer will do. What it returns for an image depends on no other image.
    """
    raise NotImplementedError("question 4: write mlp_encode")


def mlp_decode(params, z):
    """The decoder: a network with at least one hidden layer.

    params: of `init_mlp_vae`. z: (N, D). Returns logits, any real numbers: (N, 28, 28, 1).
    """
    raise NotImplementedError("question 4: write mlp_decode")


def generate(decode, z):
    """Images as the decoder's pixel probabilities, in [0, 1]: (N, D) -> (N, 28, 28, 1). It is written already."""
    return sigmoid(decode(z))


# ------------------------------------------------------------------------------------------------- question 5: the loss


def negative_elbo(encode, decode, batch):
    """The loss that training makes small: minus the bound of Eq. (1), as a mean over the batch.

    encode, decode, batch: as in `elbo_terms`. Returns the pair (loss, terms): one number, shape (), and a dict with the
    keys "reconstruction" and "kl", the means over the batch of what `elbo_terms` returns, to be reported.
    """
    raise NotImplementedError("question 5: write negative_elbo")
