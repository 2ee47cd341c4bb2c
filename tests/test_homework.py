"""The code that the homework asks for, question by question; docs/homework.md has the questions and their answers.

What the code is compared with is worked out here in another way: by loops, by matrix algebra on joint Gaussians, by
quadrature, by Monte Carlo. No question needs the code of a later one. (The claims of the written answers have their
tests in test_answers.py.) "Eq." is the sheet's; the rest of the package has the numbers of the paper.
"""

from scratchgen import diffusion, ops, plots, vae
from scratchgen.gradients import value_and_grad
from scratchgen.optim import adam_step, init_moments

import numpy as np
import pytest
from finite_differences import assert_gradients
from test_diffusion import images, of_x_t, oracle

# ---------------------------------------------------------------------------------------------------------- 4: the VAE


def test_question_4_z_is_mu_plus_sigma_eps_and_gradients_reach_both(rng):
    mu, log_var, eps = rng.standard_normal((3, 4, 5))
    z = vae.reparameterise(mu, log_var, eps)
    for n in range(4):
        for j in range(5):
            assert z[n, j] == pytest.approx(mu[n, j] + np.sqrt(np.exp(log_var[n, j])) * eps[n, j], rel=1e-12)
    assert_gradients(lambda mu, log_var: vae.reparameterise(mu, log_var, eps), [mu, log_var])


def test_question_4_the_kl_is_its_integral(rng):
    mu, log_var = rng.standard_normal((2, 3, 4))
    kl = vae.kl_per_dimension(mu, log_var)
    assert kl.shape == (3, 4)
    z = np.linspace(-30, 30, 60_001)
    for m, v, found in zip(mu.ravel(), np.exp(log_var).ravel(), kl.ravel(), strict=True):
        log_q = -0.5 * ((z - m) ** 2 / v + np.log(v))  # both without -log(2 pi) / 2
        log_p = -0.5 * z**2
        integral = np.sum(np.exp(log_q) * (log_q - log_p)) * (z[1] - z[0]) / np.sqrt(2 * np.pi)
        assert found == pytest.approx(integral, abs=1e-9)


def test_question_4_the_gradient_of_the_log_likelihood_is_that_of_finite_differences(rng):
    """Each image's gradient has its own factor, as in the sum over a batch."""
    logits = 3 * rng.standard_normal((3, 4, 6, 2))
    x = rng.random((3, 4, 6, 2))
    factor = rng.standard_normal(3)
    assert_gradients(lambda logits: ops.bernoulli_log_likelihood(logits, x) * factor, [logits])


def test_question_4_both_terms_of_the_bound_image_by_image(rng):
    """Four images of six pixels, two latent dimensions; encoder and decoder are any functions."""
    x = rng.random((4, 2, 3, 1))
    eps = rng.standard_normal((4, 2))
    A = rng.standard_normal((6, 2))
    B = rng.standard_normal((6, 2))
    C = rng.standard_normal((2, 6))

    def encode(x):
        return x.reshape(-1, 6) @ A, x.reshape(-1, 6) @ B

    reconstruction, kl = vae.elbo_terms(encode, lambda z: (z @ C).reshape(-1, 2, 3, 1), (x, eps))
    assert reconstruction.shape == kl.shape == (4,)
    for n in range(4):
        mu = x[n].ravel() @ A
        variance = np.exp(x[n].ravel() @ B)
        p = 1 / (1 + np.exp(-(mu + np.sqrt(variance) * eps[n]) @ C))
        log_likelihood = np.sum(x[n].ravel() * np.log(p) + (1 - x[n].ravel()) * np.log(1 - p))
        assert reconstruction[n] == pytest.approx(log_likelihood, rel=1e-9)
        assert kl[n] == pytest.approx(0.5 * np.sum(mu**2 + variance - 1 - np.log(variance)), rel=1e-9)


def test_question_4_the_networks_are_dense_layers_with_relus_between(rng):
    params = vae.init_mlp_vae(rng, 3, hidden=(8, 7))
    params = {
        part: [{name: leaf + 0.1 for name, leaf in layer.items()} for layer in params[part]]
        if isinstance(params[part], list)
        else {name: leaf + 0.1 for name, leaf in params[part].items()}
        for part in params
    }  # biases start at 0, and so does log_var
    x = rng.random((5, 28, 28, 1))
    z = rng.standard_normal((5, 3))

    def affine(layer, h):
        return h @ layer["w"] + layer["b"]

    h = x.reshape(5, 784)
    for layer in params["encoder"]:
        h = np.maximum(affine(layer, h), 0)
    mu, log_var = vae.mlp_encode(params, x)
    np.testing.assert_allclose(mu, affine(params["mu"], h), rtol=1e-4)
    np.testing.assert_allclose(log_var, np.minimum(affine(params["log_var"], h), vae.MAX_LOG_VAR), rtol=1e-4)
    first, second, last = params["decoder"]
    logits = affine(last, np.maximum(affine(second, np.maximum(affine(first, z), 0)), 0))
    assert vae.mlp_decode(params, z).shape == (5, 28, 28, 1)
    np.testing.assert_allclose(vae.mlp_decode(params, z).reshape(5, 784), logits, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------- 5: its training


def small_vae(params, batch, beta=1.0):
    """The loss of linear networks: six pixels, two latent dimensions."""
    encode = lambda x: (x.reshape((-1, 6)) @ params["mu"], x.reshape((-1, 6)) @ params["log_var"])  # noqa: E731
    return vae.negative_elbo(encode, lambda z: (z @ params["decode"]).reshape((-1, 1, 6, 1)), batch, beta)


def small_vae_params(rng):
    shapes = {"mu": (6, 2), "log_var": (6, 2), "decode": (2, 6)}
    return {name: 0.5 * rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_question_5_the_loss_is_minus_the_mean_of_the_bound(rng):
    params = small_vae_params(rng)
    x = rng.random((5, 1, 6, 1))
    eps = rng.standard_normal((5, 2))
    for beta in (1.0, 0.0, 2.5):
        loss, parts = small_vae(params, (x, eps), beta)
        first, second = 0.0, 0.0
        for n in range(5):
            mu = x[n].ravel() @ params["mu"]
            variance = np.exp(x[n].ravel() @ params["log_var"])
            p = 1 / (1 + np.exp(-(mu + np.sqrt(variance) * eps[n]) @ params["decode"]))
            first += np.sum(x[n].ravel() * np.log(p) + (1 - x[n].ravel()) * np.log(1 - p)) / 5
            second += 0.5 * np.sum(mu**2 + variance - 1 - np.log(variance)) / 5
        assert parts["reconstruction"] == pytest.approx(first, rel=1e-5)
        assert parts["kl"] == pytest.approx(second, rel=1e-5)
        assert loss == pytest.approx(beta * second - first, rel=1e-5)


def test_question_5_training_raises_the_bound(rng):
    """Of images that are one of two patterns, so that a code of one bit says everything."""
    patterns = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]], np.float32).reshape(2, 1, 6, 1)
    x = patterns[rng.integers(2, size=64)]
    params = small_vae_params(rng)
    moments = init_moments(params)
    losses = []
    for step in range(1, 201):
        batch = x, rng.standard_normal((64, 2), dtype=np.float32)
        loss, _, gradient = value_and_grad(small_vae)(params, batch)
        adam_step(params, gradient, moments, step, 0.02)
        losses.append(float(loss))
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:5])


# ----------------------------------------------------------------------------------------------------- 6: plot_latents


def test_question_6_all_dimensions_but_two_are_zero_and_those_run_over_the_grid():
    """The decoder paints each image in one grey, which says where its z lies: z_3 to the right and z_17 upwards."""
    asked = []

    def decode(z):
        asked.append(z)
        return (z[:, 3] + 100 * z[:, 17]).reshape(-1, 1, 1, 1) * np.ones((1, 28, 28, 1))

    figure = plots.plot_latents(decode, 20, 3, 17)
    z = np.concatenate(asked)
    others = [d for d in range(20) if d not in (3, 17)]
    assert z.shape == (100, 20) and np.all(z[:, others] == 0)
    shown = np.asarray(figure.axes[0].images[0].get_array())
    ticks = np.linspace(-3, 3, 10)
    assert shown.shape == (280, 280)
    np.testing.assert_allclose(shown[::28, ::28], ticks + 100 * ticks[::-1, None], atol=1e-4)


# ----------------------------------------------------------------------------------------------------- 7: q(x_t | x_0)


def test_question_7_the_schedule_holds_what_its_names_say(schedule):
    alpha_bar = 1.0
    for t in range(201):
        before = alpha_bar
        beta = schedule["beta"][t]
        alpha_bar *= 1 - beta
        assert schedule["alpha"][t] == 1 - beta and schedule["alpha_bar"][t] == pytest.approx(alpha_bar, rel=1e-12)
        if t > 0:
            variance = (1 - before) / (1 - alpha_bar) * beta
            assert float(schedule["posterior_variance"][t]) == pytest.approx(variance, rel=1e-7)  # in float32
    assert schedule["beta"][0] == 0 and len(schedule["beta"]) == 201


def test_question_7_the_recursion_gives_the_closed_form(schedule):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise: follow the factor of x_0 and the variance."""
    factor, variance = 1.0, 0.0
    one = np.ones((1, 1, 1, 1))
    for t in range(1, 201):
        beta = schedule["beta"][t]
        factor = np.sqrt(1 - beta) * factor
        variance = (1 - beta) * variance + beta
        assert abs(np.sqrt(schedule["alpha_bar"][t]) - factor) < 1e-12
        assert abs(1 - schedule["alpha_bar"][t] - variance) < 1e-12
        assert float(schedule["sqrt_alpha_bar"][t]) == pytest.approx(factor, rel=1e-7)  # in float32
        assert float(schedule["sqrt_one_minus_alpha_bar"][t]) == pytest.approx(np.sqrt(variance), rel=1e-7)
        at_t = np.array([t])
        assert diffusion.q_sample(schedule, one, at_t, 0 * one) == pytest.approx(factor, rel=1e-6)
        assert diffusion.q_sample(schedule, 0 * one, at_t, one) == pytest.approx(np.sqrt(variance), rel=1e-6)


def test_question_7_each_image_has_its_own_t(schedule, rng):
    x_0, eps, t = *rng.standard_normal((2, 3, 2, 5, 1)), np.array([1, 200, 60])
    together = diffusion.q_sample(schedule, x_0, t, eps)
    for n in range(3):
        alone = diffusion.q_sample(schedule, x_0[n : n + 1], t[n : n + 1], eps[n : n + 1])
        np.testing.assert_array_equal(together[n], alone[0])


# -------------------------------------------------------------------------------- 8: the KL of q(x_T | x_0) to N(0, I)


def test_question_8_the_kl_is_the_general_formula_and_monte_carlo_agrees(rng):
    alpha_bar = 0.3
    s = {"alpha_bar": np.array([1, alpha_bar])}
    x_0 = rng.uniform(-1, 1, (1, 2, 3, 1))
    x = x_0.ravel()
    d = 6
    m = np.sqrt(alpha_bar) * x
    S = (1 - alpha_bar) * np.eye(6)
    general = 0.5 * (np.trace(S) + m @ m - d - np.linalg.slogdet(S)[1])  # D_KL(N(m, S) || N(0, I))
    found = diffusion.prior_kl(s, x_0)[0]
    assert found == pytest.approx(general, rel=1e-12)

    draws = m + np.sqrt(1 - alpha_bar) * rng.standard_normal((300_000, 6))
    log_ratio = 0.5 * (draws**2).sum(axis=1) - 0.5 * ((draws - m) ** 2).sum(axis=1) / (1 - alpha_bar)
    log_ratio -= 0.5 * d * np.log(1 - alpha_bar)
    assert abs(found - log_ratio.mean()) < 4 * log_ratio.std() / np.sqrt(len(draws))


def test_question_8_if_the_betas_sum_to_infinity_it_falls_to_zero(rng):
    """Constant ones, and the paper's range over more and more steps: in the end rounding leaves nothing of it."""
    x_0 = rng.uniform(-1, 1, (1, 28, 28, 1))

    def after(betas):
        return diffusion.prior_kl({"alpha_bar": np.cumprod(1 - betas)}, x_0)[0]

    for betas_of in (lambda T: np.full(T, 0.02), lambda T: np.linspace(1e-4, 0.02, T)):
        values = [after(betas_of(T)) for T in (50, 100, 200, 400, 1000)]
        assert np.all(np.diff(values) < 0)  # all above 1e-7, where rounding is below 1e-12
        assert abs(after(betas_of(4000))) < 1e-9  # rounding, in whatever order it is added up
    # -log(1 - a) = a + a^2 / 2 + ..: the terms in d alpha_bar cancel, and alpha_bar ||x_0||^2 / 2 is left.
    assert after(np.full(800, 0.02)) == pytest.approx(0.5 * 0.98**800 * (x_0**2).sum(), rel=1e-3)
    assert after(0.5 ** np.arange(2, 60)) > 100  # a finite sum: most of the image is left for ever


# ------------------------------------------------------------------------------------------------- 9: the reverse step


def by_bayes_rule(beta, before, x_0, x_t):
    """Mean and variance of x_{t-1} given x_t and x_0 from their joint Gaussian; ``before`` is alpha_bar_{t-1}."""
    # x_{t-1} = sqrt(before) x_0 + sqrt(1 - before) e_1 and x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) e_2.
    A = np.array([[np.sqrt(1 - before), 0], [np.sqrt((1 - beta) * (1 - before)), np.sqrt(beta)]])
    covariance = A @ A.T
    mean = np.sqrt(before) * x_0 * np.array([1, np.sqrt(1 - beta)])
    gain = covariance[0, 1] / covariance[1, 1]
    return mean[0] + gain * (x_t - mean[1]), covariance[0, 0] - gain * covariance[1, 0]


def test_question_9_mean_and_variance_are_bayes_rule_on_the_joint_gaussian(schedule):
    x_0 = 0.37
    x_t = -0.81
    pixel = np.ones((1, 1, 1, 1))
    for t in range(2, 201):
        mean, variance = by_bayes_rule(schedule["beta"][t], np.prod(1 - schedule["beta"][1:t]), x_0, x_t)
        found_mean, found_variance = diffusion.q_posterior(schedule, x_0 * pixel, x_t * pixel, np.array([t]))
        assert found_mean == pytest.approx(mean, rel=1e-5, abs=1e-6)
        assert found_variance == pytest.approx(variance, rel=1e-5)
        from_factors = float(schedule["posterior_x_0"][t]) * x_0 + float(schedule["posterior_x_t"][t]) * x_t
        assert from_factors == pytest.approx(mean, abs=1e-7)  # the factors are float32
        assert float(schedule["posterior_variance"][t]) == pytest.approx(variance, rel=1e-7)


def test_question_9_the_mean_in_terms_of_the_noise(schedule, rng):
    """(x_t - beta_t / sqrt(1 - alpha_bar_t) eps_t) / sqrt(alpha_t), with the eps_t of Eq. (7)."""
    pixel = np.ones((1, 1, 1, 1), np.float32)
    for t in range(2, 201):
        alpha = 1 - schedule["beta"][t]
        beta = schedule["beta"][t]
        before = np.prod(1 - schedule["beta"][1:t])
        x_0 = rng.uniform(-1, 1)
        eps = rng.standard_normal()
        x_t = np.sqrt(alpha * before) * x_0 + np.sqrt(1 - alpha * before) * eps
        in_terms_of_eps = (x_t - beta / np.sqrt(1 - alpha * before) * eps) / np.sqrt(alpha)
        assert in_terms_of_eps == pytest.approx(by_bayes_rule(beta, before, x_0, x_t)[0], abs=1e-9)
        mean, _ = diffusion.q_posterior(schedule, x_0 * pixel, x_t * pixel, np.array([t]))
        assert mean == pytest.approx(in_terms_of_eps, abs=1e-5)


# -------------------------------------------------------------------------------------- 10: the KL of the reverse step


def general_kl(m_1, S_1, m_2, S_2):
    """D_KL(N(m_1, S_1) || N(m_2, S_2)), by matrices."""
    inverse = np.linalg.inv(S_2)
    log_ratio = np.linalg.slogdet(S_2)[1] - np.linalg.slogdet(S_1)[1]
    return 0.5 * (np.trace(inverse @ S_1) - len(m_1) + (m_2 - m_1) @ inverse @ (m_2 - m_1) + log_ratio)


def test_question_10_gaussian_kl_is_the_general_formula_for_diagonal_covariances(rng):
    m_1, m_2 = rng.standard_normal((2, 5))
    v_1, v_2 = np.exp(rng.standard_normal((2, 5)))
    expected = general_kl(m_1, np.diag(v_1), m_2, np.diag(v_2))
    assert diffusion.gaussian_kl(m_1, v_1, m_2, v_2).sum() == pytest.approx(expected, rel=1e-12)
    equal = general_kl(m_1, np.diag(v_1), m_2, np.diag(v_1))
    assert diffusion.gaussian_kl(m_1, v_1, m_2, v_1).sum() == pytest.approx(equal, rel=1e-12)
    assert equal == pytest.approx((0.5 * (m_1 - m_2) ** 2 / v_1).sum(), rel=1e-12)
    # The VAE's second term is the same divergence, to the prior.
    expected = general_kl(m_1, np.diag(v_1), np.zeros(5), np.eye(5))
    assert vae.kl_per_dimension(m_1, np.log(v_1)).sum() == pytest.approx(expected, rel=1e-12)


def test_question_10_the_kl_is_the_weighted_squared_error_of_the_noise(schedule, rng):
    """w_t ||eps - eps_theta||^2 with w_t = beta_t^2 / (2 beta~_t alpha_t (1 - alpha_bar_t)), by Eq. (6)."""
    x_0 = rng.uniform(-1, 1, (1, 4, 6, 1))
    eps, wrong = rng.standard_normal((2, 1, 4, 6, 1))
    weights = diffusion.bound_weights(schedule)
    assert weights.shape == (199,)
    for t in range(2, 201, 9):
        alpha_bar = schedule["alpha_bar"][t]
        beta = schedule["beta"][t]
        variance = (1 - alpha_bar / (1 - beta)) / (1 - alpha_bar) * beta
        weight = beta**2 / (2 * variance * (1 - beta) * (1 - alpha_bar))
        assert weights[t - 2] == pytest.approx(weight, rel=1e-6)
        if schedule["sqrt_alpha_bar"][t] < 0.01:  # else float32 knows no better
            continue
        x_t = np.sqrt(alpha_bar) * x_0 + np.sqrt(1 - alpha_bar) * eps
        x_0_theta = (x_t - np.sqrt(1 - alpha_bar) * wrong) / np.sqrt(alpha_bar)
        mean, found_variance = diffusion.q_posterior(schedule, x_0, x_t, np.array([t]))
        mean_theta, _ = diffusion.q_posterior(schedule, x_0_theta, x_t, np.array([t]))
        kl = diffusion.gaussian_kl(mean, found_variance, mean_theta, found_variance).sum()
        assert kl == pytest.approx(weight * ((eps - wrong) ** 2).sum(), rel=1e-4)


# ----------------------------------------------------------------------------------------------------- 11: Algorithm 1


def test_question_11_t_is_drawn_evenly_from_1_to_T_and_the_noise_is_normal(rng):
    """Pearson's chi-squared over the twelve t: mean 11, and above 40 once in 40,000 times."""
    N, T = 12_000, 12
    x_0 = rng.standard_normal((N, 1, 2, 1), dtype=np.float32)
    same, t, eps = diffusion.draw_batch(diffusion.make_schedule("linear", T), x_0, rng)
    assert same is x_0 and t.shape == (N,) and t.min() == 1 and t.max() == T
    assert np.sum((np.bincount(t, minlength=T + 1)[1:] - N / T) ** 2 / (N / T)) < 40
    assert eps.shape == x_0.shape and eps.dtype == np.float32 and len(np.unique(eps)) > 0.99 * eps.size
    assert eps.mean() == pytest.approx(0, abs=0.03) and eps.std() == pytest.approx(1, abs=0.03)
    assert abs(np.corrcoef(eps[:, 0, 0, 0], t)[0, 1]) < 0.04


def test_question_11_the_simple_loss_is_its_definition(schedule, rng):
    """Eq. (8) as a mean over images and pixels, one by one in float64; the prediction depends on x_t and on t."""
    x_0, t, eps = batch = diffusion.draw_batch(schedule, images(rng, 30), rng)
    total = 0.0
    for n in range(30):
        alpha_bar = np.prod(1 - schedule["beta"][1 : t[n] + 1])
        x_t = np.sqrt(alpha_bar) * x_0[n].astype(np.float64) + np.sqrt(1 - alpha_bar) * eps[n].astype(np.float64)
        total += np.sum((eps[n] - (0.9 * x_t + 0.002 * t[n])) ** 2)
    value, terms = diffusion.simple_loss(of_x_t, schedule, batch)
    assert terms == {"loss": value}
    assert value.shape == () and value == pytest.approx(total / 30 / (4 * 6), rel=1e-5)


def test_question_11_training_lowers_the_loss(rng):
    """Images of one grey level each, and a network of two numbers: how much of x_t it takes for noise, and a shift."""
    schedule = diffusion.make_schedule("linear", 20)
    params = {"slope": np.zeros(1, np.float32), "shift": np.zeros(1, np.float32)}
    moments = init_moments(params)
    losses = []

    def loss(params, batch):
        return diffusion.simple_loss(lambda x_t, t: params["slope"] * x_t + params["shift"], schedule, batch)

    for step in range(1, 201):
        x_0 = np.full((32, 4, 6, 1), 0.5, np.float32)
        value, _, gradient = value_and_grad(loss)(params, diffusion.draw_batch(schedule, x_0, rng))
        adam_step(params, gradient, moments, step, 0.02)
        losses.append(float(value))
    assert losses[0] == pytest.approx(1, abs=0.15)  # that of predicting no noise
    assert np.mean(losses[-20:]) < 0.2
    assert params["slope"][0] > 0.8 and params["shift"][0] < -0.05  # what is noise is above the image's grey


# ----------------------------------------------------------------------------------------------------- 12: Algorithm 2


def test_question_12_where_nothing_is_clipped_the_step_is_line_4(schedule, rng):
    """x_{t-1} = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t) + sqrt(beta~_t) z."""
    for t in (1, 2, 10, 60, 100):
        x_0 = 0.3 * images(rng, 3)
        eps, z = rng.standard_normal((2, 3, 4, 6, 1), dtype=np.float32)
        alpha_bar = np.prod(1 - schedule["beta"][1 : t + 1])
        beta = schedule["beta"][t]
        x_t = (np.sqrt(alpha_bar) * x_0 + np.sqrt(1 - alpha_bar) * eps).astype(np.float32)
        mean = (x_t - beta / np.sqrt(1 - alpha_bar) * eps) / np.sqrt(1 - beta)
        spread = np.sqrt((1 - alpha_bar / (1 - beta)) / (1 - alpha_bar) * beta)
        asked = []

        def eps_theta(x_t, t, eps=eps, asked=asked):
            asked.append((x_t, t))
            return eps

        found = diffusion.p_sample(eps_theta, schedule, x_t, t, z)
        np.testing.assert_allclose(found, mean + spread * z, atol=1e-4)
        ((shown, times),) = asked
        assert shown is x_t and times.tolist() == [t] * 3


def test_question_12_the_predicted_x_0_is_solved_for_and_clipped(schedule, rng):
    x_0 = 1.5 * images(rng, 4)
    eps = rng.standard_normal((4, 4, 6, 1), dtype=np.float32)
    t = np.array([1, 20, 50, 80])
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    found = diffusion.predict_x_0(schedule, x_t, t, eps)
    assert (np.abs(x_0) > 1).any() and (np.abs(x_0) < 1).any()
    np.testing.assert_allclose(found, np.clip(x_0, -1, 1), atol=1e-3)


def test_question_12_from_x_T_the_chain_goes_down_to_t_0_with_fresh_noise_at_each_step(rng):
    schedule = diffusion.make_schedule("linear", 9)
    shape = (2, 4, 6, 1)
    x_T = rng.standard_normal(shape, dtype=np.float32)
    seen = []

    def eps_theta(x_t, t):
        seen.append((x_t.copy(), int(t[0])))
        return 0.5 * x_t

    trajectory = list(diffusion.sample(eps_theta, schedule, x_T, np.random.default_rng(3)))
    assert [t for t, _ in trajectory] == list(range(8, -1, -1)) and [t for _, t in seen] == list(range(9, 0, -1))
    np.testing.assert_array_equal(seen[0][0], x_T)
    for (shown, _), (_, x_t) in zip(seen[1:], trajectory, strict=False):  # each step starts where the last one ended
        np.testing.assert_array_equal(shown, x_t)
    noises = []
    for (x_t, t), (_, x) in zip(seen, trajectory, strict=True):
        if t > 1:
            mean = diffusion.p_sample(lambda x_t, t: 0.5 * x_t, schedule, x_t, t, np.zeros(shape, np.float32))
            noises.append((x - mean) / np.sqrt(schedule["posterior_variance"][t]))
    assert np.std(noises) == pytest.approx(1, abs=0.15)
    first = noises[0].ravel()
    second = noises[1].ravel()
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.6


def test_question_12_a_denoiser_that_knows_the_image_ends_at_it(schedule, rng):
    x_0 = images(rng, 2)
    x_T = rng.standard_normal(x_0.shape, dtype=np.float32)
    *_, (t, x) = diffusion.sample(oracle(schedule, x_0), schedule, x_T, rng)
    assert t == 0
    np.testing.assert_allclose(x, x_0, atol=1e-5)
