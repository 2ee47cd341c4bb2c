"""Numbers that compare models: how far samples are from real images, and how many latent dimensions are in use.

Dimensions: N and M images, F features, D latent dimensions.
"""

import numpy as np


def active_units(mu, threshold=0.01):
    """Which latent dimensions depend on x, (D,): the variance over images of mu, (N, D), is above the threshold.

    The measure and its threshold are those of Burda, Grosse and Salakhutdinov 2016, Sec. 5.2.
    """
    return mu.var(axis=0, dtype=np.float64) > threshold


def frechet_distance(a, b):
    """The Frechet distance between Gaussians fitted to two sets of features, (N, F) and (M, F) (Heusel et al. 2017).

    ||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2), means and covariances in float64. It shrinks as N and M grow even
    where both sets come from one distribution: compare only distances of equal N and M.
    """
    a = a.astype(np.float64)
    b = b.astype(np.float64)
    C_a = np.cov(a, rowvar=False)
    C_b = np.cov(b, rowvar=False)
    # The trace of (C_a C_b)^1/2 is the sum of the roots of the eigenvalues of C_a C_b, which are those of the symmetric
    # A C_b A with A = C_a^1/2. Rounding leaves some of them a little below zero.
    eigenvalues, Q = np.linalg.eigh(C_a)
    A = Q * np.sqrt(np.maximum(eigenvalues, 0)) @ Q.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(A @ C_b @ A), 0)).sum()
    return float(((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + np.trace(C_a + C_b) - 2 * cross)


def variance_ratio(generated, real):
    """The variance of samples' features, (N, F), summed over features, divided by that of real images, (M, F).

    If it is below 1, samples are less diverse than real images."""
    return float(generated.var(axis=0, dtype=np.float64).sum() / real.var(axis=0, dtype=np.float64).sum())


def precision(real, generated, k=3, block=500):
    """Share of the generated points, (N, F), inside the k-nearest-neighbour ball of at least one real one, (M, F).

    Kynkaanniemi et al. 2019, Eqs. (1) and (2). Broken images lower precision; missing kinds of images lower `recall`.
    Both depend on the numbers of images, and are below one even if both sets come from one distribution.
    """
    real = real.astype(np.float64)

    def blocks_of_distances(points):  # squared, (n, F) -> (n, M) each; rounding makes some negative
        for start in range(0, len(points), block):
            a = points[start : start + block].astype(np.float64)
            yield np.maximum((a * a).sum(axis=1)[:, None] + (real * real).sum(axis=1) - 2 * a @ real.T, 0)

    # The squared radius of each ball; the 0th neighbour is the point itself.
    radii = np.concatenate([np.partition(distances, k, axis=1)[:, k] for distances in blocks_of_distances(real)])
    inside = [(distances <= radii).any(axis=1) for distances in blocks_of_distances(generated)]
    return float(np.concatenate(inside).mean())


def recall(real, generated):
    """Share of the real points inside the k-nearest-neighbour ball of at least one generated one."""
    return precision(generated, real)


def nearest_distance(images, others, block=100):
    """The distance from each image to the nearest of the others: the root mean square difference of pixels, in grey
    levels. (N, H, W, 1), (M, H, W, 1) uint8 -> (N,). Copies of training images would be much nearer to them than test
    images are. Blurred images are a little nearer, too."""
    x, y = (a.reshape(len(a), -1).astype(np.float32) for a in (images, others))
    squares = np.einsum("mp,mp->m", y, y)
    least = [(squares - 2 * part @ y.T).min(axis=1) for part in np.split(x, range(block, len(x), block))]
    return np.sqrt(np.maximum(np.concatenate(least) + np.einsum("np,np->n", x, x), 0) / x.shape[1])
