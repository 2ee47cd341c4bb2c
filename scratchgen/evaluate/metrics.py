"""Numbers that say how good a model is: bounds on its likelihood, and how far its samples are from real images.

Dimensions: N images of H x W pixels and C channels, D latent dimensions, K importance samples, F features.
"""

import math

from scratchgen.diffusion import q_posterior, q_sample

import numpy as np

# -------------------------------------------------------------------------------------------------------------- the VAE


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


# --------------------------------------------------------------------------- the diffusion model: its variational bound
# Eq. (5) of Ho, Jain and Abbeel 2020: -log p(x_0) <= L_T + L_{T-1} + .. + L_0 in expectation over q, with
# L_T = `diffusion.prior_kl` and, for t = T .. 1,
#
#     L_{t-1} = D_KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)) for t > 1,    L_0 = -log p_theta(x_0 | x_1).
#
# The model is exactly what Algorithm 2 draws from: its mean is Eq. (7) of x_0_theta(x_t, t), the predicted x_0, and its
# variance beta~_t. Only beta~_1 = 0 has to be replaced, by beta~_2, or a pixel that is off by one grey level would cost
# infinitely much.


def gaussian_kl(mean, variance, mean_theta, variance_theta):
    """D_KL(N(mean, variance) || N(mean_theta, variance_theta)) of each component, in nats; arguments broadcast.

    It is 1/2 (tr(S_theta^-1 S) - d + log(det S_theta / det S) + (m_theta - m)^T S_theta^-1 (m_theta - m)) where both
    covariances are diagonal: then it is a sum over components. Where they are equal, only the last term is left.
    """
    ratio = variance / variance_theta
    return 0.5 * (ratio - 1 - np.log(ratio) + (mean - mean_theta) ** 2 / variance_theta)


def loss_weights(schedule):
    """w_t for t = 2..T, (T - 1,): where no x_0 is clipped, L_{t-1} = w_t ||eps - eps_theta||^2, their Eq. (12)."""
    beta, alpha, alpha_bar_before = schedule["beta"][2:], schedule["alpha"][2:], schedule["alpha_bar"][1:-1]
    return beta / (2 * alpha * (1 - alpha_bar_before))


def bound_terms(x_0_theta, schedule, x_0, t, eps, *labels):
    """L_{t-1} of each image at its own t, in nats, (N,) float64; eps (N, H, W, C) leads to the x_t that it is for.

    For an x_0_theta that takes labels, they are those of -log p(x_0 | label)."""
    x_t = q_sample(schedule, x_0, t, eps)
    mean, variance = q_posterior(schedule, x_0, x_t, t)
    mean_theta, _ = q_posterior(schedule, x_0_theta(x_t, t, *labels), x_t, t)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 at t = 1, where the decoder takes its place
        divergence = gaussian_kl(mean, variance, mean_theta, variance)
    terms = divergence.reshape(len(t), -1).sum(axis=1, dtype=np.float64)
    last = t == 1
    sigma = math.sqrt(schedule["posterior_variance"][min(2, len(schedule["beta"]) - 1)] or schedule["beta"][1])
    terms[last] = -discretised_log_likelihood(x_0[last], mean_theta[last], sigma)
    return terms


def discretised_log_likelihood(x, mean, sigma, levels=256):
    """log p(x) in nats per image, (N,): the decoder of their Sec. 3.3.

    x and mean are (N, H, W, C), x on the grey levels. A pixel's probability is what N(mean, sigma^2) puts between the
    middles of its grey level and the next ones; the first and the last level, -1 and 1, have all that lies beyond
    them too.
    """
    half = 1 / (levels - 1)
    x, mean = x.astype(np.float64), mean.astype(np.float64)
    above, below = (x + half - mean) / sigma, (x - half - mean) / sigma
    above[x > 1 - half], below[x < -1 + half] = np.inf, -np.inf
    # Phi(above) - Phi(below) = Phi(-below) - Phi(-above): on the side where both are small, nothing cancels.
    flip = above + below > 0
    above, below = np.where(flip, -below, above), np.where(flip, -above, below)
    probability = normal_cdf(above) - normal_cdf(below)
    log_p = np.log(np.maximum(probability, 1e-300))  # 37 sigma away float64 has only 0
    return log_p.sum(axis=(1, 2, 3))


def normal_cdf(x):
    return 0.5 * erfc(-x / math.sqrt(2))


erfc = np.vectorize(math.erfc, otypes=[float])  # NumPy has none; ten million pixels a second is fast enough


def bits_per_dimension(nats, dimensions):
    return nats / (dimensions * math.log(2))


# ---------------------------------------------------------------------------------------------------- samples of either


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


def share_within(points, others, k=3, block=500):
    """The share of the points, (N, F), that lie where the others are, (M, F): as near to one of them as its own k-th
    nearest neighbour among them is, or nearer.

    Kynkaanniemi et al. 2019 (Eqs. 1 and 2): that of samples within real images is their precision, that of real images
    within samples their recall. A torn picture lowers the first, a kind that is missing the second. Both depend on the
    numbers of images, and are below one where both sets come from one distribution.
    """

    def distances(a, b):  # squared, (n, M)
        squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2 * a @ b.T
        return np.maximum(squares, 0)  # which rounding makes negative

    points, others = points.astype(np.float64), others.astype(np.float64)
    blocks = [others[start : start + block] for start in range(0, len(others), block)]
    radii = np.concatenate([np.partition(distances(some, others), k, axis=1)[:, k] for some in blocks])  # 0th is itself
    blocks = [points[start : start + block] for start in range(0, len(points), block)]
    return float(np.concatenate([(distances(some, others) <= radii).any(axis=1) for some in blocks]).mean())
