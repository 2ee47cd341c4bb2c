"""Numbers that say how good a model is, and that mean something outside this repository.

The diffusion model's bound stands in ``diffusion.py``, next to the q and p that it compares. Dimensions: N images of
H x W pixels and one channel, D latent dimensions, K importance samples, F features.
"""

import math

import numpy as np


def frechet_distance(a, b):
    """The Frechet distance between Gaussians fitted to two sets of features, (N, F) and (M, F) (Heusel et al. 2017).

    ||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2), means and covariances in float64. It shrinks as N and M grow even
    where both sets come from one distribution: compare only distances of equal N and M.
    """
    (m_a, C_a), (m_b, C_b) = (
        (x.mean(axis=0, dtype=np.float64), np.cov(x, rowvar=False, dtype=np.float64)) for x in (a, b)
    )
    # The trace of (C_a C_b)^1/2 is the sum of the roots of the eigenvalues of C_a C_b, which are those of the symmetric
    # A C_b A with A = C_a^1/2. Rounding leaves some of them a little below zero.
    eigenvalues, Q = np.linalg.eigh(C_a)
    A = Q * np.sqrt(np.maximum(eigenvalues, 0)) @ Q.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(A @ C_b @ A), 0)).sum()
    return float(((m_a - m_b) ** 2).sum() + np.trace(C_a) + np.trace(C_b) - 2 * cross)


def importance_weighted_bound(encode, decode, log_likelihood, x, K, rngs, block=500):
    """log of the mean of K importance weights w = p(x | z) p(z) / q(z | x), z ~ q(z | x), in nats per image, (N,).

    In expectation it is the bound of Burda, Grosse and Salakhutdinov 2016, Eq. (8): the ELBO for K = 1, and ever
    closer to log p(x) from below as K grows. x is (N, H, W, 1), ``rngs`` one generator an image;
    ``log_likelihood(logits, x)`` is log p(x | z). Float32, but for the sum over a block's weights and over the blocks.
    """
    mu, log_var = encode(x)
    sigma, bound = np.exp(0.5 * log_var), np.full(len(x), -np.inf)
    for n, rng in enumerate(rngs):
        for start in range(0, K, block):
            eps = rng.standard_normal((min(block, K - start), mu.shape[1]), dtype=np.float32)
            z = mu[n] + sigma[n] * eps
            # log p(z) - log q(z | x): of both Gaussians, - D/2 log 2 pi cancels.
            log_ratio = 0.5 * (eps**2 - z**2 + log_var[n]).sum(axis=1, dtype=np.float64)
            log_w = log_likelihood(decode(z), x[n]) + log_ratio
            bound[n] = np.logaddexp.reduce(log_w, initial=bound[n])
    return bound - math.log(K)


def active_units(mu, threshold=0.01):
    """Which latent dimensions say anything about x: the variance over images of mu (N, D) is above the threshold, (D,).

    The measure and its threshold are those of Burda, Grosse and Salakhutdinov 2016, Sec. 5.2.
    """
    return mu.var(axis=0, dtype=np.float64) > threshold


def bits_per_dimension(nats, dimensions):
    return nats / (dimensions * math.log(2))
