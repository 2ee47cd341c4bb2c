"""The variational autoencoder of Kingma and Welling 2014.

    prior     p(z)     = N(0, I)
    decoder   p(x | z) = product over pixels of Bernoulli(sigmoid(logits(z)))
    encoder   q(z | x) = N(mu(x), diag(exp(log_var(x))))
    ELBO(x)            = E_q(z|x)[log p(x | z)] - D_KL(q(z | x) || p(z))  <=  log p(x)

Dimensions: N images, H = W = 28, one channel; D latent dimensions. Images x are (N, H, W, 1) in [0, 1]. Grey pixels are
read as probabilities: the first term is a negative cross-entropy, at most the negative entropy of the pixels
(`entropy_floor`). All terms are in nats per image.

First the bound, which takes encoder and decoder as functions; below it the pairs of networks to choose from.
"""

import math
from functools import partial

from scratchgen.layers import conv, dense, init_conv, init_dense, init_mlp, mlp
from scratchgen.ops import bernoulli_log_likelihood, depth_to_space, glu, mean, relu, sigmoid, space_to_depth

import autograd.numpy as np  # NumPy with functions that autograd can record


def reparameterise(mu, log_var, eps):
    """z = mu + sigma eps, (N, D): if eps ~ N(0, I), a sample of q(z | x), differentiable in mu and log_var."""
    return mu + np.exp(0.5 * log_var) * eps


def kl_per_dimension(mu, log_var):
    """D_KL(N(mu, exp(log_var)) || N(0, 1)) of each latent dimension, (N, D): App. B of the paper."""
    return 0.5 * (mu * mu + np.exp(log_var) - 1 - log_var)


def elbo_terms(encode, decode, batch):
    """Both terms of the bound for a batch (x, eps), each (N,): E_q[log p(x | z)] by one draw of z, and the KL.

    ``encode(x)`` returns mu and log_var, ``decode(z)`` logits; eps is (N, D) from N(0, I). ELBO = reconstruction - KL.
    """
    x, eps = batch
    mu, log_var = encode(x)
    z = reparameterise(mu, log_var, eps)
    reconstruction = bernoulli_log_likelihood(decode(z), x)
    kl = np.sum(kl_per_dimension(mu, log_var), axis=1)
    return reconstruction, kl


def negative_elbo(encode, decode, batch, beta=1.0):
    """The loss (the batch mean of -ELBO), and its two terms for the log.

    With ``beta`` other than 1 it is the loss of a beta-VAE (Higgins et al. 2017). With beta above 1 the bound is
    looser; below 1 it is no bound.
    """
    reconstruction, kl = elbo_terms(encode, decode, batch)
    terms = {"reconstruction": mean(reconstruction), "kl": mean(kl)}
    return beta * terms["kl"] - terms["reconstruction"], terms


def generate(decode, z):
    """Images as the decoder's pixel probabilities, in [0, 1]: (N, D) -> (N, H, W, 1)."""
    return sigmoid(decode(z))


def entropy_floor(x):
    """Mean over images of the summed binary entropy of their pixels, in nats: -ELBO cannot fall below it."""
    p = x.astype("float64")
    q = 1 - p
    entropy = -p * np.log(np.where(p > 0, p, 1)) - q * np.log(np.where(q > 0, q, 1))  # 0 log 0 = 0
    return float(entropy.sum() / len(x))


# ------------------------------------------------------------------------------- q(z | x), the output of every encoder

MAX_LOG_VAR = 2.0  # for q(z | x); the prior has 0


def init_gaussian(rng, hidden, latent_dim):
    return {
        "mu": init_dense(rng, hidden, latent_dim, gain=1.0),
        "log_var": init_dense(rng, hidden, latent_dim, gain=0.0),  # sigma starts at 1, as in the prior
    }


def gaussian(params, h):  # (N, C) -> 2 x (N, D)
    """mu and log_var of q(z | x); log_var is clipped above.

    In training, log_var stays below the limit, so no gradient is lost. Without the limit an outlier can get any
    log_var: one test image had 9.9. Its z was thirty times as far from 0 as z is in training, and its ELBO was
    -300,000 nats.
    """
    return dense(params["mu"], h), np.clip(dense(params["log_var"], h), -np.inf, MAX_LOG_VAR)


# ----------------------------------------- 784 - 300 - 300 - D - 300 - 300 - 784, all dense, with ReLUs or with gates


def init_mlp_vae(rng, latent_dim, hidden=(300, 300), pixels=28 * 28, gated=False):
    *before, last = hidden
    outputs = 2 * last if gated else last  # glu halves them, relu does not
    return {
        # The encoder's last layer has gain 1, although a ReLU or glu follows it.
        "encoder": init_mlp(rng, [pixels, *before, outputs], gated),
        **init_gaussian(rng, last, latent_dim),
        "decoder": init_mlp(rng, [latent_dim, *hidden, pixels], gated),
    }


def mlp_encode(params, x, activation=relu):  # (N, H, W, 1) -> 2 x (N, D)
    h = activation(mlp(params["encoder"], np.reshape(x, (len(x), -1)), activation))
    return gaussian(params, h)


def mlp_decode(params, z, activation=relu):  # (N, D) -> (N, H, W, 1)
    return np.reshape(mlp(params["decoder"], z, activation), (len(z), 28, 28, 1))


# ------------------------------------------------------- convolutions at 14 x 14 and 7 x 7, and the same way back
# `space_to_depth`, then a dense layer, is a 2 x 2 convolution of stride 2; a dense layer, then `depth_to_space`, is a
# transposed one.


def init_conv_vae(rng, latent_dim, hidden=256):
    return {
        "encoder": {
            "conv14": init_conv(rng, 4, 32),
            "down": init_dense(rng, 4 * 32, 64),
            "conv7": init_conv(rng, 64, 64),
            "hidden": init_dense(rng, 7 * 7 * 64, hidden),
        },
        **init_gaussian(rng, hidden, latent_dim),
        "decoder": {
            "hidden": init_dense(rng, latent_dim, hidden),
            "spread": init_dense(rng, hidden, 7 * 7 * 64),
            "conv7": init_conv(rng, 64, 64),
            "up": init_dense(rng, 64, 4 * 32),
            "conv14": init_conv(rng, 32, 32),
            "pixels": init_dense(rng, 32, 4, gain=1.0),
        },
    }


def conv_encode(params, x):  # (N, H, W, 1) -> 2 x (N, D)
    layer = params["encoder"]
    h = relu(conv(layer["conv14"], space_to_depth(x, 2)))  # (N, 14, 14, 32)
    h = relu(dense(layer["down"], space_to_depth(h, 2)))  # (N, 7, 7, 64)
    h = relu(conv(layer["conv7"], h))
    h = relu(dense(layer["hidden"], np.reshape(h, (len(x), -1))))
    return gaussian(params, h)


def conv_decode(params, z):  # (N, D) -> (N, H, W, 1)
    layer = params["decoder"]
    h = relu(dense(layer["spread"], relu(dense(layer["hidden"], z))))
    h = relu(conv(layer["conv7"], np.reshape(h, (len(z), 7, 7, 64))))
    h = relu(depth_to_space(dense(layer["up"], h), 2))  # (N, 14, 14, 32)
    h = relu(conv(layer["conv14"], h))
    return depth_to_space(dense(layer["pixels"], h), 2)


# --arch on the command line: name -> (init, encode, decode)
gated = partial(init_mlp_vae, gated=True), partial(mlp_encode, activation=glu), partial(mlp_decode, activation=glu)
VAES = {
    "mlp": (init_mlp_vae, mlp_encode, mlp_decode),
    "gated": gated,
    "conv": (init_conv_vae, conv_encode, conv_decode),
}


# ------------------------------------------------------------------------- a tighter bound, to measure a trained model


def importance_weighted_bound(encode, decode, x, K, rngs, block=500):
    """log of the mean of K importance weights w = p(x | z) p(z) / q(z | x), z ~ q(z | x), in nats per image, (N,).

    In expectation it is the bound of Burda, Grosse and Salakhutdinov 2016, Eq. (8): the ELBO for K = 1, and ever closer
    to log p(x) from below as K grows. x is (N, H, W, 1), ``rngs`` a generator per image. In float32, except the sums of
    the weights: float64.
    """
    mu, log_var = encode(x)
    sigma = np.exp(0.5 * log_var)
    bound = np.full(len(x), -np.inf)
    for n, rng in enumerate(rngs):
        for start in range(0, K, block):
            eps = rng.standard_normal((min(block, K - start), mu.shape[1]), dtype=np.float32)
            z = mu[n] + sigma[n] * eps
            # log p(z) - log q(z | x): the term -D/2 log(2 pi) of both cancels.
            log_ratio = 0.5 * (eps**2 - z**2 + log_var[n]).sum(axis=1, dtype=np.float64)
            log_w = bernoulli_log_likelihood(decode(z), x[n]) + log_ratio
            largest = max(bound[n], log_w.max())  # taken out, so that exp cannot overflow
            bound[n] = largest + np.log(np.exp(bound[n] - largest) + np.exp(log_w - largest).sum())
    return bound - math.log(K)
