"""Answers to the homework that are wrong, and some that are right but not ours. test_handout.py tries them.

Each is (question, what it is, the functions that it writes). They run in the module that they are for, where np is
autograd's NumPy, but in plots.py.
"""

WRONG = [
    (
        4,
        "the variance for the deviation",
        "def reparameterise(mu, log_var, eps):\n    return mu + np.exp(log_var) * eps",
    ),
    (4, "log_var for the deviation", "def reparameterise(mu, log_var, eps):\n    return mu + log_var * eps"),
    (
        4,
        "the mean of the batch",
        "def reparameterise(mu, log_var, eps):\n    return 0 * mu + mu[0] + np.exp(0.5 * log_var) * eps",
    ),
    (4, "no noise", "def reparameterise(mu, log_var, eps):\n    return mu + 0 * eps"),
    (
        4,
        "no gradient reaches log_var",
        """
from autograd.tracer import getval
def reparameterise(mu, log_var, eps):
    return mu + np.exp(0.5 * getval(log_var)) * eps""",
    ),
    (
        4,
        "already summed",
        """
def kl_per_dimension(mu, log_var):
    return np.sum(0.5 * (mu * mu + np.exp(log_var) - 1 - log_var), axis=1)""",
    ),
    (4, "the sign", "def kl_per_dimension(mu, log_var):\n    return -0.5 * (mu * mu + np.exp(log_var) - 1 - log_var)"),
    (4, "no half", "def kl_per_dimension(mu, log_var):\n    return mu * mu + np.exp(log_var) - 1 - log_var"),
    (4, "no -1", "def kl_per_dimension(mu, log_var):\n    return 0.5 * (mu * mu + np.exp(log_var) - log_var)"),
    (
        4,
        "log_var for the logarithm of sigma",
        "def kl_per_dimension(mu, log_var):\n    return 0.5 * (mu * mu + np.exp(2 * log_var) - 1 - 2 * log_var)",
    ),
    (
        4,
        "overflow",
        """
def bernoulli_log_likelihood(logits, x):
    p = 1 / (1 + np.exp(-logits))
    terms = x * np.log(p) + (1 - x) * np.log(1 - p)
    return np.sum(np.reshape(terms, (len(x), -1)), axis=1)""",
    ),
    (
        4,
        "probabilities clipped",
        """
def bernoulli_log_likelihood(logits, x):
    p = np.clip(1 / (1 + np.exp(-np.clip(logits, -500, 500))), 1e-7, 1 - 1e-7)
    terms = x * np.log(p) + (1 - x) * np.log(1 - p)
    return np.sum(np.reshape(terms, (len(x), -1)), axis=1)""",
    ),
    (
        4,
        "a mean over pixels",
        """
def bernoulli_log_likelihood(logits, x):
    terms = x * logits - np.logaddexp(0, logits)
    return np.mean(np.reshape(terms, (len(x), -1)), axis=1)""",
    ),
    (
        4,
        "the cross-entropy",
        """
def bernoulli_log_likelihood(logits, x):
    terms = x * logits - np.logaddexp(0, logits)
    return -np.sum(np.reshape(terms, (len(x), -1)), axis=1)""",
    ),
    (
        4,
        "summed over the batch",
        "def bernoulli_log_likelihood(logits, x):\n    return np.sum(x * logits - np.logaddexp(0, logits))",
    ),
    (
        4,
        "a gradient without what arrives from above",
        """
@op
def bernoulli_log_likelihood(logits, x):
    terms = x * logits - np.logaddexp(0, logits)
    return terms.reshape(len(x), -1).sum(axis=1), lambda g: (x - sigmoid(logits),)""",
    ),
    (
        4,
        "a gradient with the first image's",
        """
@op
def bernoulli_log_likelihood(logits, x):
    terms = x * logits - np.logaddexp(0, logits)
    return terms.reshape(len(x), -1).sum(axis=1), lambda g: (g[0] * (x - sigmoid(logits)),)""",
    ),
    (
        4,
        "the KL as a mean over dimensions",
        """
def elbo_terms(encode, decode, batch):
    x, eps = batch
    mu, log_var = encode(x)
    kl = np.mean(kl_per_dimension(mu, log_var), axis=1)
    return bernoulli_log_likelihood(decode(reparameterise(mu, log_var, eps)), x), kl""",
    ),
    (
        4,
        "the KL of the whole batch for each image",
        """
def elbo_terms(encode, decode, batch):
    x, eps = batch
    mu, log_var = encode(x)
    kl = np.sum(kl_per_dimension(mu, log_var)) * np.ones(len(x))
    return bernoulli_log_likelihood(decode(reparameterise(mu, log_var, eps)), x), kl""",
    ),
    (
        4,
        "mu decoded",
        """
def elbo_terms(encode, decode, batch):
    x, eps = batch
    mu, log_var = encode(x)
    return bernoulli_log_likelihood(decode(mu), x), np.sum(kl_per_dimension(mu, log_var), axis=1)""",
    ),
    (
        4,
        "the pair exchanged",
        """
def elbo_terms(encode, decode, batch):
    x, eps = batch
    mu, log_var = encode(x)
    z = reparameterise(mu, log_var, eps)
    return np.sum(kl_per_dimension(mu, log_var), axis=1), bernoulli_log_likelihood(decode(z), x)""",
    ),
    (
        4,
        "log_var = 2 everywhere",
        """
def mlp_encode(params, x):
    mu = dense(params["mu"], relu(mlp(params["encoder"], np.reshape(x, (len(x), -1)))))
    return mu, 2 + 0 * mu""",
    ),
    (
        4,
        "log_var = 2 everywhere, since it is cut off at the wrong side",
        """
def mlp_encode(params, x):
    h = relu(mlp(params["encoder"], np.reshape(x, (len(x), -1))))
    return dense(params["mu"], h), np.clip(dense(params["log_var"], h), 2, np.inf)""",
    ),
    (
        4,
        "mu for log_var",
        """
def mlp_encode(params, x):
    mu = dense(params["mu"], relu(mlp(params["encoder"], np.reshape(x, (len(x), -1)))))
    return mu, mu""",
    ),
    (
        4,
        "one head for both",
        """
def mlp_encode(params, x):
    mu = dense(params["mu"], relu(mlp(params["encoder"], np.reshape(x, (len(x), -1)))))
    return mu, 0.5 * mu - 1""",
    ),
    (
        4,
        "no activation in the encoder",
        """
def mlp_encode(params, x):
    same = lambda h: h
    h = mlp(params["encoder"], np.reshape(x, (len(x), -1)), same)
    return dense(params["mu"], h), dense(params["log_var"], h)""",
    ),
    (
        4,
        "log_var never negative",
        """
def mlp_encode(params, x):
    h = relu(mlp(params["encoder"], np.reshape(x, (len(x), -1))))
    return dense(params["mu"], h), relu(0.1 + dense(params["log_var"], h))""",
    ),
    (
        4,
        "one log_var for all dimensions",
        """
def mlp_encode(params, x):
    h = relu(mlp(params["encoder"], np.reshape(x, (len(x), -1))))
    mu = dense(params["mu"], h)
    return mu, 0 * mu + dense(params["log_var"], h)[:, :1]""",
    ),
    (
        4,
        "an encoder that sees the mean of the batch",
        """
def mlp_encode(params, x):
    h = np.reshape(x, (len(x), -1))
    h = relu(mlp(params["encoder"], h - np.mean(h, axis=0)))
    return dense(params["mu"], h), dense(params["log_var"], h)""",
    ),
    (
        4,
        "probabilities for logits",
        """
def mlp_decode(params, z):
    return np.reshape(1 / (1 + np.exp(-mlp(params["decoder"], z))), (len(z), 28, 28, 1))""",
    ),
    (
        4,
        "no activation in the decoder",
        """
def mlp_decode(params, z):
    return np.reshape(mlp(params["decoder"], z, lambda h: h), (len(z), 28, 28, 1))""",
    ),
    (
        4,
        "deaf to a dimension of z",
        """
def mlp_decode(params, z):
    z = np.concatenate([z[:, :-1], 0 * z[:, -1:]], axis=1)
    return np.reshape(mlp(params["decoder"], z), (len(z), 28, 28, 1))""",
    ),
    (
        4,
        "flat images",
        "def mlp_decode(params, z):\n    return mlp(params['decoder'], z)",
    ),
    (
        4,
        "parameters that nothing uses",
        """
def init_mlp_vae(rng, latent_dim):
    return {
        "encoder": init_mlp(rng, [784, 50, 50]),
        **{name: init_dense(rng, 50, latent_dim) for name in ("mu", "log_var", "spare")},
        "decoder": init_mlp(rng, [latent_dim, 50, 784]),
    }""",
    ),
    (
        4,
        "weights that are deaf to rng",
        """
def init_mlp_vae(rng, latent_dim):
    rng = np.random.default_rng(0)
    return {
        "encoder": init_mlp(rng, [784, 50, 50]),
        **{name: init_dense(rng, 50, latent_dim) for name in ("mu", "log_var")},
        "decoder": init_mlp(rng, [latent_dim, 50, 784]),
    }""",
    ),
    (
        5,
        "the bound itself",
        """
def negative_elbo(encode, decode, batch):
    first, kl = (mean(term) for term in elbo_terms(encode, decode, batch))
    return first - kl, {"reconstruction": first, "kl": kl}""",
    ),
    (
        5,
        "a sum over the batch",
        """
def negative_elbo(encode, decode, batch):
    first, kl = (np.sum(term) for term in elbo_terms(encode, decode, batch))
    return kl - first, {"reconstruction": first, "kl": kl}""",
    ),
    (
        5,
        "the loss alone",
        """
def negative_elbo(encode, decode, batch):
    first, kl = (mean(term) for term in elbo_terms(encode, decode, batch))
    return kl - first""",
    ),
    (
        5,
        "no KL",
        """
def negative_elbo(encode, decode, batch):
    first, kl = (mean(term) for term in elbo_terms(encode, decode, batch))
    return -first, {"reconstruction": first, "kl": kl}""",
    ),
    (
        5,
        "the terms exchanged",
        """
def negative_elbo(encode, decode, batch):
    first, kl = (mean(term) for term in elbo_terms(encode, decode, batch))
    return kl - first, {"reconstruction": kl, "kl": first}""",
    ),
    *(
        (6, what, f"def plot_latents(decode, latent_dim, i, j, n=10, extent=3.0):{body}")
        for what, body in {
            "transposed": """
    ticks = np.linspace(-extent, extent, n)
    z = np.zeros((n * n, latent_dim))
    z[:, i] = np.repeat(ticks[::-1], n)
    z[:, j] = np.tile(ticks, n)
    return grid(decode(z), n, "")""",
            "upside down": """
    ticks = np.linspace(-extent, extent, n)
    z = np.zeros((n * n, latent_dim))
    z[:, i] = np.tile(ticks, n)
    z[:, j] = np.repeat(ticks, n)
    return grid(decode(z), n, "")""",
            "to the left": """
    ticks = np.linspace(-extent, extent, n)
    z = np.zeros((n * n, latent_dim))
    z[:, i] = np.tile(ticks[::-1], n)
    z[:, j] = np.repeat(ticks[::-1], n)
    return grid(decode(z), n, "")""",
            "deaf to n": """
    ticks = np.linspace(-extent, extent, 10)
    z = np.zeros((100, latent_dim))
    z[:, i] = np.tile(ticks, 10)
    z[:, j] = np.repeat(ticks[::-1], 10)
    return grid(decode(z), 10, "")""",
            "deaf to extent": """
    ticks = np.linspace(-3, 3, n)
    z = np.zeros((n * n, latent_dim))
    z[:, i] = np.tile(ticks, n)
    z[:, j] = np.repeat(ticks[::-1], n)
    return grid(decode(z), n, "")""",
            "other dimensions at random": """
    ticks = np.linspace(-extent, extent, n)
    z = np.random.default_rng(0).standard_normal((n * n, latent_dim))
    z[:, i] = np.tile(ticks, n)
    z[:, j] = np.repeat(ticks[::-1], n)
    return grid(decode(z), n, "")""",
            "no even grid": """
    ticks = extent * np.linspace(-1, 1, n) ** 3
    z = np.zeros((n * n, latent_dim))
    z[:, i] = np.tile(ticks, n)
    z[:, j] = np.repeat(ticks[::-1], n)
    return grid(decode(z), n, "")""",
            "images upside down, as origin=lower makes them": """
    ticks = np.linspace(-extent, extent, n)
    z = np.zeros((n * n, latent_dim))
    z[:, i] = np.tile(ticks, n)
    z[:, j] = np.repeat(ticks, n)
    figure = new_figure(5, 5)
    figure.add_subplot().imshow(mosaic(decode(z), n, n), cmap="gray", origin="lower")
    return figure""",
            "images turned": """
    ticks = np.linspace(-extent, extent, n)
    z = np.zeros((n * n, latent_dim))
    z[:, i] = np.tile(ticks, n)
    z[:, j] = np.repeat(ticks[::-1], n)
    return grid(decode(z).transpose(0, 2, 1, 3), n, "")""",
            "nothing returned": """
    ticks = np.linspace(-extent, extent, n)
    z = np.zeros((n * n, latent_dim))
    z[:, i] = np.tile(ticks, n)
    z[:, j] = np.repeat(ticks[::-1], n)
    grid(decode(z), n, "")""",
        }.items()
    ),
    *(
        (7, what, f"def q_sample(schedule, x_0, t, eps):\n    a = schedule['alpha_bar']\n    return {body}")
        for what, body in {
            "the variance for the deviation": "np.sqrt(at(a, t)) * x_0 + (1 - at(a, t)) * eps",
            "no root before x_0": "at(a, t) * x_0 + np.sqrt(1 - at(a, t)) * eps",
            "the t of the first image": "np.sqrt(a[t[0]]) * x_0 + np.sqrt(1 - a[t[0]]) * eps",
            "alpha_bar of t - 1": "np.sqrt(at(a, t - 1)) * x_0 + np.sqrt(1 - at(a, t - 1)) * eps",
            "one step for all": "np.sqrt(at(schedule['alpha'], t)) * x_0 + np.sqrt(at(schedule['beta'], t)) * eps",
            "a minus": "np.sqrt(at(a, t)) * x_0 - x_0 * 0.01 + np.sqrt(1 - at(a, t)) * eps",
            "the noise of the first image": "np.sqrt(at(a, t)) * x_0 + np.sqrt(1 - at(a, t)) * eps[:1]",
        }.items()
    ),
    *(
        (7, what, f"def make_schedule(name, T):\n    beta = np.append(0.0, SCHEDULES[name](T))\n    {body}")
        for what, body in {
            "no t = 0": 'b = beta[1:]; return {"T": T, "beta": b, "alpha": 1 - b, "alpha_bar": np.cumprod(1 - b)}',
            "float32": "a = (1 - beta).astype(np.float32); "
            'return {"T": T, "beta": 1 - a, "alpha": a, "alpha_bar": np.cumprod(a)}',
            "a product of betas": 'return {"T": T, "beta": beta, "alpha": 1 - beta, "alpha_bar": 1 - np.cumsum(beta)}',
            "alpha_bar of t - 1": "a = np.append(1.0, np.cumprod(1 - beta)[:-1]); "
            'return {"T": T, "beta": beta, "alpha": 1 - beta, "alpha_bar": a}',
            "one name for all": 'beta = np.append(0.0, linear_betas(T)); return {"T": T, "beta": beta, '
            '"alpha": 1 - beta, "alpha_bar": np.cumprod(1 - beta)}',
            "no T": 'return {"beta": beta, "alpha": 1 - beta, "alpha_bar": np.cumprod(1 - beta)}',
        }.items()
    ),
    *(
        (
            8,
            what,
            "def prior_kl(schedule, x_0):\n"
            "    a = schedule['alpha_bar'][-1]\n"
            "    x = x_0.reshape(len(x_0), -1).astype(np.float64)\n"
            "    d = x.shape[1]\n"
            "    kl = 0.5 * (a * (x**2).sum(axis=1) - d * a - d * np.log1p(-a))\n"
            f"    {body}",
        )
        for what, body in {
            "summed over the batch": "return kl.sum()",
            "a mean over the batch": "return kl.mean() + 0 * kl",
            "of the first image": "return kl[0] + 0 * kl",
            "no half": "return 2 * kl",
            "per pixel": "return kl / d",
            "no trace": "return kl - 0.5 * d * (1 - a) + 0.5 * d",
            "the mean without its root": "return kl + 0.5 * (a**2 - a) * (x**2).sum(axis=1)",
            "of t = 1": "a = schedule['alpha_bar'][1]; "
            "return 0.5 * (a * (x**2).sum(axis=1) - d * a - d * np.log1p(-a))",
            "float32": "a = np.float32(a); x = x_0.reshape(len(x_0), -1).astype(np.float32); v = 1 - a; "
            "d = np.float32(d); return np.float32(0.5) * (d * v + a * (x**2).sum(axis=1) - d - d * np.log(v))",
        }.items()
    ),
    *(
        (
            9,
            what,
            "def q_posterior(schedule, x_0, x_t, t):\n"
            "    b, a, c, p = (at(schedule[k], t) for k in ('beta', 'alpha', 'alpha_bar', 'alpha_bar'))\n"
            "    p = at(schedule['alpha_bar'], t - 1)\n"
            f"    {body}\n"
            "    return np.sqrt(a) * (1 - p) / (1 - c) * x_t + np.sqrt(p) * b / (1 - c) * x_0, (1 - p) / (1 - c) * b",
        )
        for what, body in {
            "the t of the first image": "b, a, c, p = b[:1], a[:1], c[:1], p[:1]",
            "the variance of the first image": "return (np.sqrt(a) * (1 - p) / (1 - c) * x_t "
            "+ np.sqrt(p) * b / (1 - c) * x_0, ((1 - p) / (1 - c) * b)[:1] + 0 * b)",
            "alpha_bar of t for t - 1": "p = c",
            "a bar too many": "a = c",
            "beta for the variance": "return np.sqrt(a) * (1 - p) / (1 - c) * x_t + np.sqrt(p) * b / (1 - c) * x_0, b",
            "the deviation for the variance": "return (np.sqrt(a) * (1 - p) / (1 - c) * x_t + np.sqrt(p) * b / (1 - c) "
            "* x_0, np.sqrt((1 - p) / (1 - c) * b))",
            "x_0 and x_t exchanged": "x_0, x_t = x_t, x_0",
            "no root of alpha": "a = a**2",
            "the variance alone": "return (1 - p) / (1 - c) * b",
        }.items()
    ),
    *(
        (10, what, f"def gaussian_kl(mean, variance, mean_theta, variance_theta):\n    {body}")
        for what, body in {
            "already summed": "r = variance / variance_theta; "
            "return np.sum(0.5 * (r - 1 - np.log(r) + (mean - mean_theta) ** 2 / variance_theta))",
            "exchanged": "r = variance_theta / variance; "
            "return 0.5 * (r - 1 - np.log(r) + (mean - mean_theta) ** 2 / variance)",
            "the means alone": "return 0.5 * (mean - mean_theta) ** 2 / variance_theta + 0 * variance",
            "no half": "r = variance / variance_theta; "
            "return r - 1 - np.log(r) + (mean - mean_theta) ** 2 / variance_theta",
            "the other variance below": "r = variance / variance_theta; "
            "return 0.5 * (r - 1 - np.log(r) + (mean - mean_theta) ** 2 / variance)",
            "deviations for variances": "r = (variance / variance_theta) ** 2; "
            "return 0.5 * (r - 1 - np.log(r) + (mean - mean_theta) ** 2 / variance_theta**2)",
            "the sign of the logarithm": "r = variance / variance_theta; "
            "return 0.5 * (r - 1 + np.log(r) + (mean - mean_theta) ** 2 / variance_theta)",
        }.items()
    ),
    *(
        (
            11,
            what,
            "def draw_batch(schedule, x_0, rng):\n"
            "    T, N = schedule['T'], len(x_0)\n"
            f"    {body}\n"
            "    return x_0, t, eps",
        )
        for what, body in {
            "uniform noise": "t = rng.integers(1, T + 1, N); eps = rng.random(x_0.shape)",
            "uniform noise of variance 1": "t = rng.integers(1, T + 1, N); "
            "eps = 3**0.5 * rng.uniform(-1, 1, x_0.shape)",
            "noise of signs": "t = rng.integers(1, T + 1, N); eps = rng.choice([-1.0, 1.0], x_0.shape)",
            "t in order": "t = 1 + np.arange(N) % T; eps = rng.standard_normal(x_0.shape)",
            "t sorted": "t = np.sort(rng.integers(1, T + 1, N)); eps = rng.standard_normal(x_0.shape)",
            "t from 0": "t = rng.integers(0, T, N); eps = rng.standard_normal(x_0.shape)",
            "t from 0 to T": "t = rng.integers(0, T + 1, N); eps = rng.standard_normal(x_0.shape)",
            "never T": "t = rng.integers(1, T, N); eps = rng.standard_normal(x_0.shape)",
            "one t for all": "t = np.full(N, rng.integers(1, T + 1)); eps = rng.standard_normal(x_0.shape)",
            "more of the small t": "t = 1 + (T * rng.random(N) ** 1.2).astype(int); "
            "eps = rng.standard_normal(x_0.shape)",
            "the same draws at every step": "rng = np.random.default_rng(0); t = rng.integers(1, T + 1, N); "
            "eps = rng.standard_normal(x_0.shape)",
            "the same noise at every step": "t = rng.integers(1, T + 1, N); "
            "eps = np.random.default_rng(0).standard_normal(x_0.shape)",
            "deaf to rng": "t = np.random.randint(1, T + 1, N); eps = np.random.standard_normal(x_0.shape)",
            "the same noise for all images": "t = rng.integers(1, T + 1, N); "
            "eps = np.repeat(rng.standard_normal(x_0[:1].shape), N, axis=0)",
            "the same noise for all pixels": "t = rng.integers(1, T + 1, N); "
            "eps = rng.standard_normal((N, 1, 1, 1)) + 0 * x_0",
            "noise and image mixed": "t = rng.integers(1, T + 1, N); "
            "eps = (rng.standard_normal(x_0.shape) + x_0) / (1 + x_0.var()) ** 0.5",
            "real t": "t = 1 + (T - 1) * rng.random(N); eps = rng.standard_normal(x_0.shape)",
        }.items()
    ),
    *(
        (11, what, f"def squared_errors(eps, prediction):\n    return {body}")
        for what, body in {
            "one number": "np.mean((eps - prediction) ** 2)",
            "one number for all images": "np.mean((eps - prediction) ** 2) + 0 * eps[:, 0, 0, 0]",
            "a sum over the pixels": "np.sum((eps - prediction) ** 2, axis=(1, 2, 3))",
            "absolute errors": "np.mean(np.abs(eps - prediction), axis=(1, 2, 3))",
            "the first channel alone": "np.mean((eps - prediction)[..., 0] ** 2, axis=(1, 2))",
            "a root": "np.sqrt(np.mean((eps - prediction) ** 2, axis=(1, 2, 3)))",
        }.items()
    ),
    *(
        (
            11,
            what,
            "def simple_loss(eps_theta, schedule, batch):\n"
            "    x_0, t, eps = batch\n"
            "    x_t = q_sample(schedule, x_0, t, eps)\n"
            f"    {body}\n"
            "    return loss, {'loss': loss}",
        )
        for what, body in {
            "the image for the noise": "loss = mean(squared_errors(x_0, eps_theta(x_t, t)))",
            "the clean image for x_t": "loss = mean(squared_errors(eps, eps_theta(x_0, t)))",
            "the t of the first image": "loss = mean(squared_errors(eps, eps_theta(x_t, t[0])))",
            "a t that is off by one": "loss = mean(squared_errors(eps, eps_theta(x_t, t - 1)))",
            "a sum over the batch": "loss = np.sum(squared_errors(eps, eps_theta(x_t, t)))",
            "the first image": "loss = squared_errors(eps, eps_theta(x_t, t))[0]",
            "minus the loss": "loss = -mean(squared_errors(eps, eps_theta(x_t, t)))",
            "the loss alone": "return mean(squared_errors(eps, eps_theta(x_t, t)))",
        }.items()
    ),
    *(
        (12, what, f"def predict_x_0(schedule, x_t, t, eps):\n    a = at(schedule['alpha_bar'], t)\n    return {body}")
        for what, body in {
            "unclipped": "(x_t - np.sqrt(1 - a) * eps) / np.sqrt(a)",
            "clipped to [0, 1]": "np.clip((x_t - np.sqrt(1 - a) * eps) / np.sqrt(a), 0, 1)",
            "the t of the first image": "np.clip((x_t - np.sqrt(1 - a[:1]) * eps) / np.sqrt(a[:1]), -1, 1)",
            "the variance for the deviation": "np.clip((x_t - (1 - a) * eps) / np.sqrt(a), -1, 1)",
            "no factor below": "np.clip(x_t - np.sqrt(1 - a) * eps, -1, 1)",
        }.items()
    ),
    *(
        (
            12,
            what,
            "def p_sample(eps_theta, schedule, x_t, t, z):\n"
            "    times = np.full(len(x_t), t)\n"
            "    eps = eps_theta(x_t, times)\n"
            "    x_0 = predict_x_0(schedule, x_t, times, eps)\n"
            "    mean, variance = q_posterior(schedule, x_0, x_t, times)\n"
            f"    {body}\n"
            "    return mean + np.sqrt(variance) * z",
        )
        for what, body in {
            "Eq. (11) of the paper, unclipped": "mean = (x_t - schedule['beta'][t] "
            "/ np.sqrt(1 - schedule['alpha_bar'][t]) * eps) / np.sqrt(schedule['alpha'][t])",
            "the variance for the deviation": "variance = variance**2",
            "beta for the variance": "variance = 0 * variance + (t > 1) * schedule['beta'][t]",
            "noise in the last step": "variance = variance + (t == 1) * schedule['beta'][1]",
            "no noise": "z = 0 * z",
            "the noise of the first image": "z = z[:1]; mean = mean + 0 * z; variance = variance * 1.2",
            "noise after half": "z = 0.5 * z",
            "the predicted image": "mean = x_0",
        }.items()
    ),
    *(
        (
            12,
            what,
            "def sample(eps_theta, schedule, x_T, rng):\n"
            "    T, x = schedule['T'], x_T\n"
            f"    {before}\n"
            "    for t in range(T, 0, -1):\n"
            f"        {body}\n"
            "        yield t - 1, x",
        )
        for what, (before, body) in {
            "uniform noise": ("", "x = p_sample(eps_theta, schedule, x, t, rng.random(x.shape))"),
            "uniform noise of variance 1": (
                "",
                "x = p_sample(eps_theta, schedule, x, t, 3**0.5 * rng.uniform(-1, 1, x.shape))",
            ),
            "the same noise at every step": (
                "z = rng.standard_normal(x.shape)",
                "x = p_sample(eps_theta, schedule, x, t, z)",
            ),
            "the same noise for all images": (
                "",
                "x = p_sample(eps_theta, schedule, x, t, rng.standard_normal(x[:1].shape))",
            ),
            "deaf to rng": (
                "rng = np.random.default_rng(0)",
                "x = p_sample(eps_theta, schedule, x, t, rng.standard_normal(x.shape))",
            ),
            "random, whatever rng is": (
                "",
                "x = p_sample(eps_theta, schedule, x, t, np.random.standard_normal(x.shape))",
            ),
            "no noise": ("", "x = p_sample(eps_theta, schedule, x, t, 0 * x)"),
            "always from x_T": ("", "x = p_sample(eps_theta, schedule, x_T, t, rng.standard_normal(x.shape))"),
            "not from x_T": (
                "x = rng.standard_normal(x_T.shape)",
                "x = p_sample(eps_theta, schedule, x, t, rng.standard_normal(x.shape))",
            ),
            "t in order": ("", "x = p_sample(eps_theta, schedule, x, T + 1 - t, rng.standard_normal(x.shape))"),
            "t, not t - 1": ("", "x = p_sample(eps_theta, schedule, x, t, rng.standard_normal(x.shape)); t += 1"),
        }.items()
    ),
    (
        4,
        "the same noise in all dimensions",
        """
def reparameterise(mu, log_var, eps):
    return mu + np.exp(0.5 * log_var) * eps[:, :1]""",
    ),
    (
        4,
        "the noise of the first image for all",
        """
def reparameterise(mu, log_var, eps):
    return mu + np.exp(0.5 * log_var) * eps[:1]""",
    ),
    (
        4,
        "the noise of another image",
        """
def reparameterise(mu, log_var, eps):
    return mu + np.exp(0.5 * log_var) * eps[::-1]""",
    ),
    (
        4,
        "a gradient that is not a number at large logits",
        """
def bernoulli_log_likelihood(logits, x):
    softplus = np.where(logits > 0, logits + np.log1p(np.exp(-logits)), np.log1p(np.exp(logits)))
    return np.sum((x * logits - softplus).reshape((len(x), -1)), axis=1)""",
    ),
    (
        4,
        "another gradient at a logit of zero",
        """
def bernoulli_log_likelihood(logits, x):
    terms = x * logits - np.maximum(logits, 0) * (logits > 0) - np.log1p(np.exp(-np.abs(logits)))
    return np.sum(terms.reshape((len(x), -1)), axis=1)""",
    ),
    (
        6,
        "the dimensions in the order of their numbers",
        """
def plot_latents(decode, latent_dim, i, j, n=10, extent=3.0):
    i, j = max(i, j), min(i, j)
    values = np.linspace(-extent, extent, n, dtype=np.float32)
    z = np.zeros((n, n, latent_dim), np.float32)
    z[:, :, i] = values[None, :]
    z[:, :, j] = values[::-1, None]
    return grid(decode(z.reshape(n * n, latent_dim)), n, "title")""",
    ),
    (
        7,
        "noise subtracted",
        """
def q_sample(schedule, x_0, t, eps):
    a = at(schedule["alpha_bar"], t)
    return np.sqrt(a) * x_0 - np.sqrt(1 - a) * eps""",
    ),
    (
        7,
        "x_t clipped",
        """
def q_sample(schedule, x_0, t, eps):
    a = at(schedule["alpha_bar"], t)
    return np.clip(np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps, -1, 1)""",
    ),
    (
        7,
        "x_0 changed in place",
        """
def q_sample(schedule, x_0, t, eps):
    a = at(schedule["alpha_bar"], t)
    x_0 *= np.sqrt(a)
    x_0 += np.sqrt(1 - a) * eps
    return x_0""",
    ),
    (
        7,
        "the noise of the first row in all rows",
        """
def q_sample(schedule, x_0, t, eps):
    a = at(schedule["alpha_bar"], t)
    return np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps[:, :1]""",
    ),
    (
        7,
        "each image's mean grey",
        """
def q_sample(schedule, x_0, t, eps):
    a = at(schedule["alpha_bar"], t)
    return np.sqrt(a) * np.mean(x_0, axis=(1, 2, 3), keepdims=True) + np.sqrt(1 - a) * eps""",
    ),
    (
        7,
        "the sign of the noise lost",
        """
def q_sample(schedule, x_0, t, eps):
    a = at(schedule["alpha_bar"], t)
    return np.sqrt(a) * x_0 + np.sqrt(1 - a) * np.abs(eps)""",
    ),
    (
        8,
        "channels forgotten",
        """
def prior_kl(schedule, x_0):
    a = schedule["alpha_bar"][-1]
    x = np.asarray(x_0, np.float64)
    d = x.shape[1] * x.shape[2]
    return 0.5 * (a * (np.sum(x**2, axis=(1, 2, 3)) - d) - d * np.log1p(-a))""",
    ),
    (
        11,
        "the same noise in all rows",
        """
def draw_batch(schedule, x_0, rng):
    N, H, W, C = x_0.shape
    eps = np.repeat(rng.standard_normal((N, 1, W, C), dtype=np.float32), H, axis=1)
    return x_0, rng.integers(1, schedule["T"] + 1, N), eps""",
    ),
    (
        11,
        "t in eight bits",
        """
def draw_batch(schedule, x_0, rng):
    t = rng.integers(1, schedule["T"] + 1, len(x_0)).astype(np.int8)
    return x_0, t, rng.standard_normal(x_0.shape, dtype=np.float32)""",
    ),
    (
        6,
        "the sigmoid once more",
        """
def plot_latents(decode, latent_dim, i, j, n=10, extent=3.0):
    values = np.linspace(-extent, extent, n, dtype=np.float32)
    z = np.zeros((n, n, latent_dim), np.float32)
    z[:, :, i] = values[None, :]
    z[:, :, j] = values[::-1, None]
    images = 1 / (1 + np.exp(-decode(z.reshape(n * n, latent_dim))))
    return grid(images, n, "title")""",
    ),
    (
        6,
        "greys from -1 to 1",
        """
def plot_latents(decode, latent_dim, i, j, n=10, extent=3.0):
    values = np.linspace(-extent, extent, n, dtype=np.float32)
    z = np.zeros((n, n, latent_dim), np.float32)
    z[:, :, i] = values[None, :]
    z[:, :, j] = values[::-1, None]
    images = decode(z.reshape(n * n, latent_dim))
    return grid(images, n, "title", -1, 1)""",
    ),
]

RIGHT = [
    (4, "a root", "def reparameterise(mu, log_var, eps):\n    return np.sqrt(np.exp(log_var)) * eps + mu"),
    (4, "minus the noise", "def reparameterise(mu, log_var, eps):\n    return mu - np.exp(log_var / 2) * eps"),
    (
        4,
        "by sigma",
        """
def kl_per_dimension(mu, log_var):
    sigma = np.exp(0.5 * log_var)
    return (mu**2 + sigma**2 - 1) / 2 - np.log(sigma)""",
    ),
    (
        4,
        "by logaddexp",
        """
def bernoulli_log_likelihood(logits, x):
    return np.sum(np.reshape(x * logits - np.logaddexp(0, logits), (len(logits), -1)), axis=1)""",
    ),
    (
        4,
        "by both logarithms, axis by axis",
        """
def bernoulli_log_likelihood(logits, x):
    terms = -x * np.logaddexp(0, -logits) - (1 - x) * np.logaddexp(0, logits)
    return np.sum(terms, axis=tuple(range(1, len(x.shape))))""",
    ),
    (
        4,
        "a primitive with its own gradient",
        """
@op
def bernoulli_log_likelihood(logits, x):
    terms = x * logits - np.maximum(logits, 0) - np.log1p(np.exp(-np.abs(logits)))
    p = 1 / (1 + np.exp(-logits))
    return terms.reshape(len(x), -1).sum(axis=1), lambda g: ((x - p) * g.reshape(-1, *[1] * (x.ndim - 1)),)""",
    ),
    (
        4,
        "all at once",
        """
def elbo_terms(encode, decode, batch):
    mu, log_var = encode(batch[0])
    z = mu + np.exp(log_var / 2) * batch[1]
    return bernoulli_log_likelihood(decode(z), batch[0]), 0.5 * (mu**2 + np.exp(log_var) - 1 - log_var).sum(-1)""",
    ),
    (
        4,
        "one hidden layer, one matrix for both heads, float64",
        """
def init_mlp_vae(rng, latent_dim):
    sizes = ((784, 64), (64, 2 * latent_dim), (latent_dim, 64), (64, 784))
    return [(rng.standard_normal((i, o)) / np.sqrt(i), np.zeros(o)) for i, o in sizes]
def mlp_encode(params, x):
    (W, b), (V, c), _, _ = params
    h = np.tanh(np.reshape(x, (-1, 784)) @ W + b) @ V + c
    return np.split(h, 2, axis=1)
def mlp_decode(params, z):
    _, _, (W, b), (V, c) = params
    return np.reshape(np.tanh(z @ W + b) @ V + c, (-1, 28, 28, 1))""",
    ),
    (
        4,
        "convolutions",
        """
init_mlp_vae, mlp_encode, mlp_decode = init_conv_vae, conv_encode, conv_decode""",
    ),
    (
        4,
        "log_var unbounded, four layers, silu",
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
    ),
    (
        5,
        "np.mean",
        """
def negative_elbo(encode, decode, batch):
    reconstruction, kl = elbo_terms(encode, decode, batch)
    return -np.mean(reconstruction - kl), {"reconstruction": np.mean(reconstruction), "kl": np.mean(kl)}""",
    ),
    *(
        (6, what, f"def plot_latents(decode, latent_dim, i, j, n=10, extent=3.0):{body}")
        for what, body in {
            "origin=lower, and each image turned over": """
    ticks = np.linspace(-extent, extent, n)
    z = np.zeros((n * n, latent_dim))
    z[:, i] = np.tile(ticks, n)
    z[:, j] = np.repeat(ticks, n)
    figure = new_figure(5, 5)
    figure.add_subplot().imshow(mosaic(decode(z)[:, ::-1], n, n), cmap="gray", origin="lower")
    return figure""",
            "subplots": """
    ticks = np.linspace(-extent, extent, n)
    figure = new_figure(5, 5)
    for row, z_j in zip(figure.subplots(n, n), ticks[::-1]):
        for axes, z_i in zip(row, ticks):
            z = np.zeros((1, latent_dim))
            z[0, i], z[0, j] = z_i, z_j
            axes.imshow(decode(z)[0, ..., 0], cmap="gray", vmin=0, vmax=1)
            axes.axis("off")
    return figure""",
            "pyplot, another colour map, no limits": """
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
            "grid and meshgrid": """
    z_i, z_j = np.meshgrid(np.linspace(-extent, extent, n), np.linspace(extent, -extent, n))
    z = np.zeros((n, n, latent_dim))
    z[..., i], z[..., j] = z_i, z_j
    return grid(decode(z.reshape(-1, latent_dim)), n, "latents")""",
        }.items()
    ),
    (
        7,
        "a plain quotient at t = 0",
        """
def make_schedule(name, T):
    beta = np.concatenate([[0.0], SCHEDULES[name](T)])
    alpha = 1 - beta
    alpha_bar = np.cumprod(alpha)
    before = np.append(1.0, alpha_bar[:-1])
    variance = (1 - before) / (1 - alpha_bar) * beta
    factor = np.sqrt(before) * beta / (1 - alpha_bar)
    return {"T": T, "beta": beta, "alpha": alpha, "alpha_bar": alpha_bar, "variance": variance, "x_0": factor}
def q_sample(schedule, x_0, t, eps):
    return np.sqrt(at(schedule["alpha_bar"], t)) * x_0 + np.sqrt(1 - at(schedule["alpha_bar"], t)) * eps""",
    ),
    (
        7,
        "the four keys, by a loop",
        """
def make_schedule(name, T):
    beta, alpha, alpha_bar = np.zeros(T + 1), np.ones(T + 1), np.ones(T + 1)
    for t, b in enumerate(SCHEDULES[name](T), 1):
        beta[t], alpha[t], alpha_bar[t] = b, 1 - b, alpha_bar[t - 1] * (1 - b)
    return dict(T=T, beta=beta, alpha=alpha, alpha_bar=alpha_bar)
def q_sample(schedule, x_0, t, eps):
    return np.sqrt(at(schedule["alpha_bar"], t)) * x_0 + np.sqrt(1 - at(schedule["alpha_bar"], t)) * eps""",
    ),
    (
        7,
        "image by image, from alpha_bar, in float64",
        """
def q_sample(schedule, x_0, t, eps):
    a = [schedule["alpha_bar"][int(s)] for s in t]
    return np.stack([np.sqrt(b) * x + np.sqrt(1 - b) * e for b, x, e in zip(a, x_0, eps)])""",
    ),
    (
        8,
        "as a sum over pixels",
        """
def prior_kl(schedule, x_0):
    a = schedule["alpha_bar"][schedule["T"]]
    pixels = gaussian_kl(np.sqrt(a) * x_0.astype(np.float64), 1 - a, 0.0, 1.0)
    return pixels.sum(axis=(1, 2, 3))""",
    ),
    (
        8,
        "from the schedule's betas, image by image",
        """
def prior_kl(schedule, x_0):
    a = np.prod(1 - schedule["beta"])
    d = x_0[0].size
    norms = np.array([np.linalg.norm(np.ravel(x).astype(float)) for x in x_0])
    return 0.5 * (d * (1 - a) + a * norms**2 - d - d * np.log(1 - a))""",
    ),
    (
        9,
        "by Bayes' rule, the variance at every pixel",
        """
def q_posterior(schedule, x_0, x_t, t):
    alpha, beta = at(schedule["alpha"], t), at(schedule["beta"], t)
    before = at(schedule["alpha_bar"], t - 1)
    variance = beta * (1 - before) / (alpha * (1 - before) + beta)
    mean = (np.sqrt(alpha) * (1 - before) * x_t + beta * np.sqrt(before) * x_0) / (alpha * (1 - before) + beta)
    return mean, variance + np.zeros(x_t.shape)""",
    ),
    (
        9,
        "in float32",
        """
def q_posterior(schedule, x_0, x_t, t):
    f = lambda values: at(values, t).astype(np.float32)
    p = np.concatenate([[1.0], schedule["alpha_bar"]])[:-1]
    with np.errstate(all="ignore"):
        v = (1 - p) / (1 - schedule["alpha_bar"])
        w = schedule["beta"] / (1 - schedule["alpha_bar"])
    return f(np.sqrt(schedule["alpha"]) * v) * x_t + f(np.sqrt(p) * w) * x_0, f(v * schedule["beta"])""",
    ),
    (
        10,
        "by logarithms",
        """
def gaussian_kl(mean, variance, mean_theta, variance_theta):
    squares = variance + (mean - mean_theta) ** 2
    return (np.log(variance_theta) - np.log(variance) + squares / variance_theta - 1) / 2""",
    ),
    (
        11,
        "float64 noise, t by choice",
        """
def draw_batch(schedule, x_0, rng):
    eps = rng.standard_normal(x_0.shape)
    return x_0, rng.choice(np.arange(1, schedule["T"] + 1), len(x_0)), eps""",
    ),
    (
        11,
        "t from the floor of uniform numbers, a copy of x_0",
        """
def draw_batch(schedule, x_0, rng):
    t = 1 + np.floor(schedule["T"] * rng.random(len(x_0))).astype(int)
    return [x_0.copy(), t, rng.normal(size=x_0.shape)]""",
    ),
    (
        11,
        "np.mean over axes",
        "def squared_errors(eps, prediction):\n    return np.mean((prediction - eps) ** 2, axis=(1, 2, 3))",
    ),
    (
        11,
        "np.mean, all at once",
        """
def simple_loss(eps_theta, schedule, batch):
    x_0, t, eps = batch
    loss = np.mean((eps - eps_theta(q_sample(schedule, x_0, t, eps), t)) ** 2)
    return loss, {"loss": loss}""",
    ),
    (
        12,
        "minimum and maximum",
        """
def predict_x_0(schedule, x_t, t, eps):
    a = at(schedule["alpha_bar"], t)
    return np.maximum(-1, np.minimum(1, x_t / np.sqrt(a) - np.sqrt(1 / a - 1) * eps))""",
    ),
    (
        12,
        "by the noise that the clipped image leaves",
        """
def p_sample(eps_theta, schedule, x_t, t, z):
    times = t * np.ones(len(x_t), dtype=int)
    alpha, beta, a = schedule["alpha"][t], schedule["beta"][t], schedule["alpha_bar"][t]
    x_0 = np.clip((x_t - np.sqrt(1 - a) * eps_theta(x_t, times)) / np.sqrt(a), -1, 1)
    eps = (x_t - np.sqrt(a) * x_0) / np.sqrt(1 - a)
    x = (x_t - beta / np.sqrt(1 - a) * eps) / np.sqrt(alpha)
    if t > 1:
        x = x + np.sqrt((1 - schedule["alpha_bar"][t - 1]) / (1 - a) * beta) * z
    return x""",
    ),
    (
        12,
        "in place",
        """
def sample(eps_theta, schedule, x_T, rng):
    for t in range(schedule["T"], 0, -1):
        x_T[:] = p_sample(eps_theta, schedule, x_T, t, rng.standard_normal(x_T.shape))
        yield t - 1, x_T""",
    ),
    (
        12,
        "no noise drawn at t = 1, a list, float64",
        """
def sample(eps_theta, schedule, x_T, rng):
    pairs, x, t = [], x_T.astype(float), schedule["T"]
    while t > 0:
        z = rng.normal(0, 1, x.shape) if t > 1 else np.zeros(x.shape)
        x = p_sample(eps_theta, schedule, x, t, z)
        t = t - 1
        pairs.append((t, x))
    return pairs""",
    ),
    (
        4,
        "log_var softly bounded",
        """
def mlp_encode(params, x):
    h = mlp(params["encoder"], x.reshape((len(x), -1)))
    D = h.shape[1] // 2
    return h[:, :D], 6 * np.tanh(h[:, D:])
def init_mlp_vae(rng, latent_dim):
    return {"encoder": init_mlp(rng, [784, 100, 2 * latent_dim]), "decoder": init_mlp(rng, [latent_dim, 100, 784])}
def mlp_decode(params, z):
    return mlp(params["decoder"], z).reshape((len(z), 28, 28, 1))""",
    ),
]
