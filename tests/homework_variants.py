"""Answers to the homework that are wrong, and some that are right but not ours. test_handout.py tries them.

They run in the module that they are for, where np is autograd's NumPy, but in plots.py.
"""

PLAIN = {  # function -> an answer that is right, of the package's functions and the four keys of a schedule
    "reparameterise": """
def reparameterise(mu, log_var, eps):
    sigma = np.exp(0.5 * log_var)
    return mu + sigma * eps""",
    "kl_per_dimension": """
def kl_per_dimension(mu, log_var):
    return 0.5 * (mu * mu + np.exp(log_var) - 1 - log_var)""",
    "bernoulli_log_likelihood": """
def bernoulli_log_likelihood(logits, x):
    terms = x * logits - np.logaddexp(0, logits)
    return np.sum(np.reshape(terms, (len(x), -1)), axis=1)""",
    "elbo_terms": """
def elbo_terms(encode, decode, batch):
    x, eps = batch
    mu, log_var = encode(x)
    z = reparameterise(mu, log_var, eps)
    kl = np.sum(kl_per_dimension(mu, log_var), axis=1)
    return bernoulli_log_likelihood(decode(z), x), kl""",
    "init_mlp_vae": """
def init_mlp_vae(rng, latent_dim):
    heads = {name: init_dense(rng, 50, latent_dim) for name in ("mu", "log_var")}
    encoder, decoder = init_mlp(rng, [784, 50, 50]), init_mlp(rng, [latent_dim, 50, 784])
    return {"encoder": encoder, **heads, "decoder": decoder}""",
    "mlp_encode": """
def mlp_encode(params, x):
    h = relu(mlp(params["encoder"], np.reshape(x, (len(x), -1))))
    mu, log_var = dense(params["mu"], h), dense(params["log_var"], h)
    return mu, log_var""",
    "mlp_decode": """
def mlp_decode(params, z):
    logits = mlp(params["decoder"], z)
    return np.reshape(logits, (len(z), 28, 28, 1))""",
    "negative_elbo": """
def negative_elbo(encode, decode, batch):
    first, kl = (mean(term) for term in elbo_terms(encode, decode, batch))
    return kl - first, {"reconstruction": first, "kl": kl}""",
    "plot_latents": """
def plot_latents(decode, latent_dim, i, j, n=10, extent=3.0):
    ticks = np.linspace(-extent, extent, n)
    z = np.zeros((n * n, latent_dim), np.float32)
    z[:, i] = np.tile(ticks, n)
    z[:, j] = np.repeat(ticks[::-1], n)
    images = decode(z)
    return grid(images, n, "")""",
    "make_schedule": """
def make_schedule(name, T):
    beta = np.append(0.0, SCHEDULES[name](T))
    alpha = 1 - beta
    alpha_bar = np.cumprod(alpha)
    return {"T": T, "beta": beta, "alpha": alpha, "alpha_bar": alpha_bar}""",
    "q_sample": """
def q_sample(schedule, x_0, t, eps):
    a = at(schedule["alpha_bar"], t)
    x_t = np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps
    return x_t""",
    "prior_kl": """
def prior_kl(schedule, x_0):
    a = schedule["alpha_bar"][-1]
    x = x_0.reshape(len(x_0), -1).astype(np.float64)
    d = x.shape[1]
    kl = 0.5 * (a * np.sum(x**2, axis=1) - d * a - d * np.log1p(-a))
    return kl""",
    "q_posterior": """
def q_posterior(schedule, x_0, x_t, t):
    b, a, c = (at(schedule[key], t) for key in ("beta", "alpha", "alpha_bar"))
    p = at(schedule["alpha_bar"], t - 1)
    mean = np.sqrt(a) * (1 - p) / (1 - c) * x_t + np.sqrt(p) * b / (1 - c) * x_0
    variance = (1 - p) / (1 - c) * b
    return mean, variance""",
    "gaussian_kl": """
def gaussian_kl(mean, variance, mean_theta, variance_theta):
    ratio = variance / variance_theta
    squares = (mean - mean_theta) ** 2 / variance_theta
    return 0.5 * (ratio - 1 - np.log(ratio) + squares)""",
    "draw_batch": """
def draw_batch(schedule, x_0, rng):
    T, N = schedule["T"], len(x_0)
    t = rng.integers(1, T + 1, N)
    eps = rng.standard_normal(x_0.shape)
    return x_0, t, eps""",
    "squared_errors": """
def squared_errors(eps, prediction):
    difference = eps - prediction
    return np.mean(difference**2, axis=(1, 2, 3))""",
    "simple_loss": """
def simple_loss(eps_theta, schedule, batch):
    x_0, t, eps = batch
    x_t = q_sample(schedule, x_0, t, eps)
    loss = mean(squared_errors(eps, eps_theta(x_t, t)))
    return loss, {"loss": loss}""",
    "predict_x_0": """
def predict_x_0(schedule, x_t, t, eps):
    a = at(schedule["alpha_bar"], t)
    x_0 = (x_t - np.sqrt(1 - a) * eps) / np.sqrt(a)
    return np.clip(x_0, -1, 1)""",
    "p_sample": """
def p_sample(eps_theta, schedule, x_t, t, z):
    times = np.full(len(x_t), t)
    eps = eps_theta(x_t, times)
    x_0 = predict_x_0(schedule, x_t, times, eps)
    mean, variance = q_posterior(schedule, x_0, x_t, times)
    return mean + np.sqrt(variance) * z""",
    "sample": """
def sample(eps_theta, schedule, x_T, rng):
    T, x = schedule["T"], x_T
    for t in range(T, 0, -1):
        z = rng.standard_normal(x.shape)
        x = p_sample(eps_theta, schedule, x, t, z)
        yield t - 1, x""",
}

LIKELIHOOD = "np.sum(np.reshape(terms, (len(x), -1)), axis=1)"
TERMS = "terms = x * logits - np.logaddexp(0, logits)"
OF_P = "\n    terms = x * np.log(p) + (1 - x) * np.log(1 - p)"
BY_HAND = "return terms.reshape(len(x), -1).sum(axis=1), lambda g:"
STEP = "rng.integers(1, T + 1, N)"
NOISE = "rng.standard_normal(x_0.shape)"
MEAN_OF_SQUARES = "np.mean(difference**2, axis=(1, 2, 3))"
DRAWN = "rng.standard_normal(x.shape)"
LOSS = "mean(squared_errors(eps, eps_theta(x_t, t)))"
NEWS = "schedule, x, t, z"

WRONG = {  # function -> what is wrong -> what stands in its plain answer, what in place of it, and so on
    "reparameterise": {
        "the variance for the deviation": ("0.5 * log_var", "log_var"),
        "log_var for the deviation": ("np.exp(0.5 * log_var)", "log_var"),
        "the mean of the batch": ("mu +", "0 * mu + mu[0] +"),
        "no noise": ("sigma *", "0 *"),
        "no gradient reaches log_var": (
            "sigma =",
            "from autograd.tracer import getval; log_var = getval(log_var); sigma =",
        ),
        "the same noise in all dimensions": ("* eps", "* eps[:, :1]"),
        "the noise of the first image for all": ("* eps", "* eps[:1]"),
        "the noise of another image": ("* eps", "* eps[::-1]"),
    },
    "kl_per_dimension": {
        "already summed": (
            "0.5 * (mu * mu + np.exp(log_var) - 1 - log_var)",
            "np.sum(0.5 * (mu**2 + np.exp(log_var) - 1 - log_var), axis=1)",
        ),
        "the sign": ("0.5", "-0.5"),
        "no half": ("0.5 * ", ""),
        "no -1": (" - 1", ""),
        "log_var for the logarithm of sigma": ("    return", "    log_var = 2 * log_var\n    return"),
    },
    "bernoulli_log_likelihood": {
        "overflow": (TERMS, "p = 1 / (1 + np.exp(-logits))" + OF_P),
        "probabilities clipped": (
            TERMS,
            "p = np.clip(1 / (1 + np.exp(-np.clip(logits, -500, 500))), 1e-7, 1 - 1e-7)" + OF_P,
        ),
        "a mean over pixels": ("np.sum", "np.mean"),
        "the cross-entropy": ("return ", "return -"),
        "summed over the batch": (LIKELIHOOD, "np.sum(terms)"),
        "a gradient without what arrives from above": (
            "def",
            "@op\ndef",
            f"return {LIKELIHOOD}",
            f"{BY_HAND} (x - sigmoid(logits),)",
        ),
        "a gradient with the first image's": (
            "def",
            "@op\ndef",
            f"return {LIKELIHOOD}",
            f"{BY_HAND} (g[0] * (x - sigmoid(logits)),)",
        ),
        "a gradient that is not a number at large logits": (
            "np.logaddexp(0, logits)",
            "np.where(logits > 0, logits + np.log1p(np.exp(-logits)), np.log1p(np.exp(logits)))",
        ),
        "another gradient at a logit of zero": (
            "np.logaddexp(0, logits)",
            "np.maximum(logits, 0) * (logits > 0) - np.log1p(np.exp(-np.abs(logits)))",
        ),
    },
    "elbo_terms": {
        "the KL as a mean over dimensions": ("np.sum", "np.mean"),
        "the KL of the whole batch for each image": (", axis=1)", ") * np.ones(len(x))"),
        "mu decoded": ("decode(z)", "decode(mu)"),
        "the pair exchanged": (
            "return bernoulli_log_likelihood(decode(z), x), kl",
            "return kl, bernoulli_log_likelihood(decode(z), x)",
        ),
    },
    "mlp_encode": {
        "log_var = 2 everywhere, since it is cut off at the wrong side": (
            "return mu, log_var",
            "return mu, np.clip(log_var, 2, np.inf)",
        ),
        "one head for both": ("return mu, log_var", "return mu, 0.5 * mu - 1"),
        "no activation in the encoder": (
            'relu(mlp(params["encoder"], np.reshape(x, (len(x), -1))))',
            'mlp(params["encoder"], np.reshape(x, (len(x), -1)), lambda h: h)',
        ),
        "log_var never negative": ("return mu, log_var", "return mu, relu(0.1 + log_var)"),
        "one log_var for all dimensions": ("return mu, log_var", "return mu, 0 * mu + log_var[:, :1]"),
        "an encoder that sees the mean of the batch": ("h = ", "x = x - np.mean(x, axis=0); h = "),
    },
    "mlp_decode": {
        "probabilities for logits": ("reshape(logits", "reshape(1 / (1 + np.exp(-logits))"),
        "no activation in the decoder": ("], z)", "], z, lambda h: h)"),
        "deaf to a dimension of z": ("logits =", "z = np.concatenate([z[:, :-1], 0 * z[:, -1:]], axis=1); logits ="),
        "flat images": ("np.reshape(logits, (len(z), 28, 28, 1))", "logits"),
    },
    "init_mlp_vae": {
        "parameters that nothing uses": ('"log_var")', '"log_var", "spare")'),
        "weights that are deaf to rng": ("heads =", "rng = np.random.default_rng(0); heads ="),
    },
    "negative_elbo": {
        "the bound itself": ("kl - first", "first - kl"),
        "a sum over the batch": ("mean(term)", "np.sum(term)"),
        "the loss alone": (', {"reconstruction": first, "kl": kl}', ""),
        "no KL": ("kl - first", "-first"),
        "the terms exchanged": ('first, "kl": kl', 'kl, "kl": first'),
    },
    "plot_latents": {
        "transposed": ("images =", "z[:, [i, j]] = z[:, [j, i]]; images ="),
        "upside down": ("ticks[::-1]", "ticks"),
        "to the left": ("tile(ticks", "tile(ticks[::-1]"),
        "deaf to n": ("ticks =", "n = 10; ticks ="),
        "deaf to extent": ("-extent, extent", "-3, 3"),
        "other dimensions at random": (
            "zeros((n * n, latent_dim), np.float32)",
            "random.default_rng(0).standard_normal((n * n, latent_dim))",
        ),
        "no even grid": ("np.linspace(-extent, extent, n)", "extent * np.linspace(-1, 1, n) ** 3"),
        "images upside down, as origin=lower makes them": ("decode(z)", "decode(z)[:, ::-1]"),
        "images turned": ("decode(z)", "decode(z).transpose(0, 2, 1, 3)"),
        "nothing returned": ("return grid", "grid"),
        "the dimensions in the order of their numbers": ("ticks =", "i, j = max(i, j), min(i, j); ticks ="),
        "the sigmoid once more": ("decode(z)", "1 / (1 + np.exp(-decode(z)))"),
        "greys from -1 to 1": ('n, "")', 'n, "", -1, 1)'),
    },
    "make_schedule": {
        "no t = 0": ("np.append(0.0, SCHEDULES[name](T))", "SCHEDULES[name](T)"),
        "float32": ("1 - beta", "(1 - beta).astype(np.float32)"),
        "a product of betas": ("np.cumprod(alpha)", "1 - np.cumsum(beta)"),
        "alpha_bar of t - 1": ("np.cumprod(alpha)", "np.append(1.0, np.cumprod(alpha)[:-1])"),
        "one name for all": ("SCHEDULES[name]", "linear_betas"),
        "no T": ('"T": T, ', ""),
    },
    "q_sample": {
        "the variance for the deviation": ("np.sqrt(1 - a)", "(1 - a)"),
        "no root before x_0": ("np.sqrt(a)", "a"),
        "the t of the first image": ("], t)", "], t[:1])"),
        "alpha_bar of t - 1": ("], t)", "], t - 1)"),
        "one step for all": ("alpha_bar", "alpha"),
        "a minus": ("x_0 +", "x_0 - 0.01 * x_0 +"),
        "the noise of the first image": ("* eps", "* eps[:1]"),
        "noise subtracted": ("+", "-"),
        "x_t clipped": ("return x_t", "return np.clip(x_t, -1, 1)"),
        "x_0 changed in place": ("return x_t", "x_0[:] = x_t\n    return x_0"),
        "the noise of the first row in all rows": ("* eps", "* eps[:, :1]"),
        "each image's mean grey": ("x_0 +", "np.mean(x_0, axis=(1, 2, 3), keepdims=True) +"),
        "the sign of the noise lost": ("* eps", "* np.abs(eps)"),
    },
    "prior_kl": {
        "summed over the batch": ("return kl", "return kl.sum()"),
        "a mean over the batch": ("return kl", "return kl.mean() + 0 * kl"),
        "of the first image": ("return kl", "return kl[0] + 0 * kl"),
        "no half": ("0.5 * ", ""),
        "per pixel": ("return kl", "return kl / d"),
        "no trace": ("return kl", "return kl + 0.5 * d * a"),
        "the mean without its root": ("a * np.sum", "a**2 * np.sum"),
        "of t = 1": ("[-1]", "[1]"),
        "float32": (
            *("[-1]", "[-1].astype(np.float32)", "float64", "float32", "x.shape[1]", "np.float32(x.shape[1])"),
            *("- d * a - d * np.log1p(-a)", "+ d * (1 - a) - d - d * np.log(1 - a)"),
        ),
        "channels forgotten": ("x.shape[1]", "x_0.shape[1] * x_0.shape[2]"),
    },
    "q_posterior": {
        "the t of the first image": ("mean =", "b, a, c, p = b[:1], a[:1], c[:1], p[:1]; mean ="),
        "the variance of the first image": ("return mean, variance", "return mean, variance[:1] + 0 * b"),
        "alpha_bar of t for t - 1": ("t - 1", "t"),
        "a bar too many": ("np.sqrt(a)", "np.sqrt(c)"),
        "beta for the variance": ("return mean, variance", "return mean, b"),
        "the deviation for the variance": ("return mean, variance", "return mean, np.sqrt(variance)"),
        "x_0 and x_t exchanged": ("mean =", "x_0, x_t = x_t, x_0; mean ="),
        "no root of alpha": ("np.sqrt(a)", "a"),
        "the variance alone": ("return mean, variance", "return variance"),
    },
    "gaussian_kl": {
        "already summed": ("0.5 * (", "0.5 * np.sum("),
        "exchanged": ("ratio =", "variance, variance_theta = variance_theta, variance; ratio ="),
        "the means alone": ("(ratio - 1 - np.log(ratio) + squares)", "squares + 0 * variance"),
        "no half": ("0.5 * ", ""),
        "the other variance below": ("2 / variance_theta", "2 / variance"),
        "deviations for variances": ("ratio =", "variance, variance_theta = variance**2, variance_theta**2; ratio ="),
        "the sign of the logarithm": ("- np.log", "+ np.log"),
    },
    "draw_batch": {
        "uniform noise": (NOISE, "rng.random(x_0.shape)"),
        "uniform noise of variance 1": (NOISE, "3**0.5 * rng.uniform(-1, 1, x_0.shape)"),
        "noise of signs": (NOISE, "rng.choice([-1.0, 1.0], x_0.shape)"),
        "t in order": (STEP, "1 + np.arange(N) % T"),
        "t sorted": (STEP, f"np.sort({STEP})"),
        "t from 0": (STEP, "rng.integers(0, T, N)"),
        "t from 0 to T": (STEP, "rng.integers(0, T + 1, N)"),
        "never T": (STEP, "rng.integers(1, T, N)"),
        "one t for all": (STEP, "np.full(N, rng.integers(1, T + 1))"),
        "more of the small t": (STEP, "1 + (T * rng.random(N) ** 1.2).astype(int)"),
        "the same draws at every step": ("t =", "rng = np.random.default_rng(0); t ="),
        "the same noise at every step": (NOISE, "np.random.default_rng(0).standard_normal(x_0.shape)"),
        "deaf to rng": ("t =", "rng = np.random.default_rng(); t ="),
        "the same noise for all images": (NOISE, "np.repeat(rng.standard_normal(x_0[:1].shape), N, axis=0)"),
        "the same noise for all pixels": (NOISE, "rng.standard_normal((N, 1, 1, 1)) + 0 * x_0"),
        "the same noise in all rows": (NOISE, "rng.standard_normal((N, 1, *x_0.shape[2:])) + 0 * x_0"),
        "noise and image mixed": (NOISE, "(rng.standard_normal(x_0.shape) + x_0) / (1 + x_0.var()) ** 0.5"),
        "real t": (STEP, "1 + (T - 1) * rng.random(N)"),
        "t in eight bits": (STEP, f"{STEP}.astype(np.int8)"),
    },
    "squared_errors": {
        "one number": (", axis=(1, 2, 3)", ""),
        "one number for all images": (MEAN_OF_SQUARES, "np.mean(difference**2) + 0 * eps[:, 0, 0, 0]"),
        "a sum over the pixels": ("np.mean", "np.sum"),
        "absolute errors": ("difference**2", "np.abs(difference)"),
        "the first channel alone": ("difference**2", "difference[..., :1] ** 2"),
        "a root": (MEAN_OF_SQUARES, f"np.sqrt({MEAN_OF_SQUARES})"),
    },
    "simple_loss": {
        "the image for the noise": ("errors(eps", "errors(x_0"),
        "the clean image for x_t": ("theta(x_t", "theta(x_0"),
        "the t of the first image": ("(x_t, t)", "(x_t, t[0])"),
        "a t that is off by one": ("(x_t, t)", "(x_t, t - 1)"),
        "a sum over the batch": ("mean(", "np.sum("),
        "the first image": (LOSS, "squared_errors(eps, eps_theta(x_t, t))[0]"),
        "minus the loss": ("= mean", "= -mean"),
        "the loss alone": ('loss, {"loss": loss}', "loss"),
    },
    "predict_x_0": {
        "unclipped": ("np.clip(x_0, -1, 1)", "x_0"),
        "clipped to [0, 1]": ("-1, 1)", "0, 1)"),
        "the t of the first image": ("], t)", "], t[:1])"),
        "the variance for the deviation": ("np.sqrt(1 - a)", "(1 - a)"),
        "no factor below": (" / np.sqrt(a)", ""),
    },
    "p_sample": {
        "Eq. (11) of the paper, unclipped": (
            "predict_x_0(schedule, x_t, times, eps)",
            "(x_t - at((1 - schedule['alpha_bar']) ** 0.5, times) * eps) / at(schedule['alpha_bar'] ** 0.5, times)",
        ),
        "the variance for the deviation": ("np.sqrt(variance)", "variance"),
        "beta for the variance": ("variance)", '0 * variance + (t > 1) * schedule["beta"][t])'),
        "noise in the last step": ("variance)", 'variance + (t == 1) * schedule["beta"][1])'),
        "no noise": ("* z", "* 0 * z"),
        "the noise of the first image": ("* z", "* z[:1]"),
        "noise after half": ("* z", "* 0.5 * z"),
        "the predicted image": ("return mean", "return x_0"),
    },
    "sample": {
        "uniform noise": (DRAWN, "rng.random(x.shape)"),
        "uniform noise of variance 1": (DRAWN, "3**0.5 * rng.uniform(-1, 1, x.shape)"),
        "the same noise at every step": (f"        z = {DRAWN}\n", "", "    for", f"    z = {DRAWN}\n    for"),
        "the same noise for all images": (DRAWN, "rng.standard_normal(x[:1].shape)"),
        "deaf to rng": ("T, x =", "rng = np.random.default_rng(0); T, x ="),
        "random, whatever rng is": (DRAWN, "np.random.standard_normal(x.shape)"),
        "no noise": (DRAWN, "0 * x"),
        "always from x_T": (NEWS, "schedule, x_T, t, z"),
        "not from x_T": ("], x_T", "], rng.standard_normal(x_T.shape)"),
        "t in order": (NEWS, "schedule, x, T + 1 - t, z"),
        "t, not t - 1": ("yield t - 1", "yield t"),
    },
}

# Student -> answers: (function, what stands in its plain answer, what in place of it) or the whole of it, with what it
# calls. Where a student has none the plain answers stand.
STUDENTS = {
    "by logarithms and by definition": [
        ("reparameterise", "np.exp(0.5 * log_var)", "np.sqrt(np.exp(log_var))"),
        """
def kl_per_dimension(mu, log_var):
    sigma = np.exp(0.5 * log_var)
    return (mu**2 + sigma**2 - 1) / 2 - np.log(sigma)""",
        """
def bernoulli_log_likelihood(logits, x):
    terms = -x * np.logaddexp(0, -logits) - (1 - x) * np.logaddexp(0, logits)
    return np.sum(terms, axis=tuple(range(1, len(x.shape))))""",
        """
def init_mlp_vae(rng, latent_dim):  # one hidden layer, one matrix for both heads, log_var softly bounded, float64
    sizes = ((784, 64), (64, 2 * latent_dim), (latent_dim, 64), (64, 784))
    return [(rng.standard_normal((i, o)) / np.sqrt(i), np.zeros(o)) for i, o in sizes]
def mlp_encode(params, x):
    (W, b), (V, c), _, _ = params
    h = np.tanh(np.reshape(x, (-1, 784)) @ W + b) @ V + c
    mu, log_var = np.split(h, 2, axis=1)
    return mu, 6 * np.tanh(log_var)
def mlp_decode(params, z):
    _, _, (W, b), (V, c) = params
    return np.reshape(np.tanh(z @ W + b) @ V + c, (-1, 28, 28, 1))""",
        ("negative_elbo", "mean(term)", "np.mean(term)"),
        """
def plot_latents(decode, latent_dim, i, j, n=10, extent=3.0):  # origin=lower, and each image turned over
    ticks = np.linspace(-extent, extent, n)
    z = np.zeros((n * n, latent_dim))
    z[:, i] = np.tile(ticks, n)
    z[:, j] = np.repeat(ticks, n)
    figure = new_figure(5, 5)
    figure.add_subplot().imshow(mosaic(decode(z)[:, ::-1], n, n), cmap="gray", origin="lower")
    return figure""",
        """
def make_schedule(name, T):  # a plain quotient, 0 / 0 at t = 0
    beta = np.concatenate([[0.0], SCHEDULES[name](T)])
    alpha_bar = np.cumprod(1 - beta)
    variance = (1 - np.append(1.0, alpha_bar[:-1])) / (1 - alpha_bar) * beta
    return {"T": T, "beta": beta, "alpha": 1 - beta, "alpha_bar": alpha_bar, "variance": variance}""",
        """
def prior_kl(schedule, x_0):
    a = schedule["alpha_bar"][schedule["T"]]
    return gaussian_kl(np.sqrt(a) * x_0.astype(np.float64), 1 - a, 0.0, 1.0).sum(axis=(1, 2, 3))""",
        """
def q_posterior(schedule, x_0, x_t, t):  # Bayes' rule; the variance at every pixel
    alpha, beta = at(schedule["alpha"], t), at(schedule["beta"], t)
    before = at(schedule["alpha_bar"], t - 1)
    variance = beta * (1 - before) / (alpha * (1 - before) + beta)
    mean = (np.sqrt(alpha) * (1 - before) * x_t + beta * np.sqrt(before) * x_0) / (alpha * (1 - before) + beta)
    return mean, variance + np.zeros(x_t.shape)""",
        """
def gaussian_kl(mean, variance, mean_theta, variance_theta):
    squares = variance + (mean - mean_theta) ** 2
    return (np.log(variance_theta) - np.log(variance) + squares / variance_theta - 1) / 2""",
        (
            "draw_batch",
            STEP,
            "rng.choice(np.arange(1, T + 1), N)",
            NOISE,
            "rng.normal(0, 1, x_0.shape).astype(np.float32)",
        ),
        ("simple_loss", LOSS, "np.mean((eps - eps_theta(x_t, t)) ** 2)"),
        """
def predict_x_0(schedule, x_t, t, eps):
    a = at(schedule["alpha_bar"], t)
    return np.maximum(-1, np.minimum(1, x_t / np.sqrt(a) - np.sqrt(1 / a - 1) * eps))""",
        """
def p_sample(eps_theta, schedule, x_t, t, z):  # by the noise that the clipped image leaves
    alpha, beta, a = schedule["alpha"][t], schedule["beta"][t], schedule["alpha_bar"][t]
    x_0 = np.clip((x_t - np.sqrt(1 - a) * eps_theta(x_t, t * np.ones(len(x_t), dtype=int))) / np.sqrt(a), -1, 1)
    eps = (x_t - np.sqrt(a) * x_0) / np.sqrt(1 - a)
    x = (x_t - beta / np.sqrt(1 - a) * eps) / np.sqrt(alpha)
    return x + (np.sqrt((1 - schedule["alpha_bar"][t - 1]) / (1 - a) * beta) * z if t > 1 else 0)""",
        """
def sample(eps_theta, schedule, x_T, rng):  # in place
    for t in range(schedule["T"], 0, -1):
        x_T[:] = p_sample(eps_theta, schedule, x_T, t, rng.standard_normal(x_T.shape))
        yield t - 1, x_T""",
    ],
    "by hand, image by image": [
        ("reparameterise", "mu +", "mu -"),
        """
@op
def bernoulli_log_likelihood(logits, x):
    terms = x * logits - np.maximum(logits, 0) - np.log1p(np.exp(-np.abs(logits)))
    p = 1 / (1 + np.exp(-logits))
    return terms.reshape(len(x), -1).sum(axis=1), lambda g: ((x - p) * g.reshape(-1, *[1] * (x.ndim - 1)),)""",
        "init_mlp_vae, mlp_encode, mlp_decode = init_conv_vae, conv_encode, conv_decode",
        """
def plot_latents(decode, latent_dim, i, j, n=10, extent=3.0):
    ticks = np.linspace(-extent, extent, n)
    figure = new_figure(5, 5)
    for row, z_j in zip(figure.subplots(n, n), ticks[::-1]):
        for axes, z_i in zip(row, ticks):
            z = np.zeros((1, latent_dim))
            z[0, i], z[0, j] = z_i, z_j
            axes.imshow(decode(z)[0, ..., 0], cmap="gray", vmin=0, vmax=1)
            axes.axis("off")
    return figure""",
        """
def q_sample(schedule, x_0, t, eps):
    a = [schedule["alpha_bar"][int(s)] for s in t]
    return np.stack([np.sqrt(b) * x + np.sqrt(1 - b) * e for b, x, e in zip(a, x_0, eps)])""",
        """
def prior_kl(schedule, x_0):
    a = np.prod(1 - schedule["beta"])
    d = x_0[0].size
    norms = np.array([np.linalg.norm(np.ravel(x).astype(float)) for x in x_0])
    return 0.5 * (d * (1 - a) + a * norms**2 - d - d * np.log(1 - a))""",
        """
def q_posterior(schedule, x_0, x_t, t):  # in float32
    f = lambda values: at(values, t).astype(np.float32)
    p = np.concatenate([[1.0], schedule["alpha_bar"]])[:-1]
    with np.errstate(all="ignore"):
        v = (1 - p) / (1 - schedule["alpha_bar"])
        w = schedule["beta"] / (1 - schedule["alpha_bar"])
    return f(np.sqrt(schedule["alpha"]) * v) * x_t + f(np.sqrt(p) * w) * x_0, f(v * schedule["beta"])""",
        """
def draw_batch(schedule, x_0, rng):  # t from the floor of uniform numbers, a copy of x_0
    t = 1 + np.floor(schedule["T"] * rng.random(len(x_0))).astype(int)
    return [x_0.copy(), t, rng.normal(size=x_0.shape)]""",
        """
def sample(eps_theta, schedule, x_T, rng):  # no noise drawn at t = 1, a list, float64
    pairs, x, t = [], x_T.astype(float), schedule["T"]
    while t > 0:
        x = p_sample(eps_theta, schedule, x, t, rng.normal(0, 1, x.shape) if t > 1 else np.zeros(x.shape))
        t = t - 1
        pairs.append((t, x))
    return pairs""",
    ],
    "silu and pyplot": [
        """
def elbo_terms(encode, decode, batch):
    mu, log_var = encode(batch[0])
    z = mu + np.exp(log_var / 2) * batch[1]
    return bernoulli_log_likelihood(decode(z), batch[0]), 0.5 * (mu**2 + np.exp(log_var) - 1 - log_var).sum(-1)""",
        """
from scratchgen.ops import silu
def init_mlp_vae(rng, latent_dim):
    return {
        "encoder": init_mlp(rng, [784, 80, 60, 40]),
        "heads": [init_dense(rng, 40, latent_dim, 1.0), init_dense(rng, 40, latent_dim, 1.0)],
        "decoder": init_mlp(rng, [latent_dim, 40, 60, 80, 784]),
    }
def mlp_encode(params, x):
    h = silu(mlp(params["encoder"], np.reshape(2 * x - 1, (len(x), 784)), silu))
    return tuple(dense(head, h) for head in params["heads"])
def mlp_decode(params, z):
    return mlp(params["decoder"], z, silu).reshape((len(z), 28, 28, 1))""",
        """
def plot_latents(decode, latent_dim, i, j, n=10, extent=3.0):  # another colour map, no limits
    import matplotlib.pyplot as plt
    ticks = np.linspace(-extent, extent, n)
    rows = []
    for z_j in reversed(ticks):
        z = np.zeros((n, latent_dim), np.float32)
        z[:, i], z[:, j] = ticks, z_j
        rows.append(np.concatenate(list(decode(z)[..., 0]), axis=1))
    figure, axes = plt.subplots()
    axes.imshow(np.concatenate(rows), cmap="gray_r", extent=(-extent, extent, -extent, extent))
    axes.set(xlabel=f"z_{i}", ylabel=f"z_{j}", title="latents")
    return figure""",
    ],
}


def edited(function, *edits):
    """The plain answer of a function with one text in it in place of another, and so on."""
    text = PLAIN[function]
    for old, new in zip(edits[::2], edits[1::2], strict=True):
        assert text.count(old) == 1, f"{function}: {old}"
        text = text.replace(old, new)
    return text
