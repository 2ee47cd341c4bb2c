"""micro.py: each formula against finite differences or an independent derivation, and then against the package."""

import ast
import gzip
import math
import os
import re
import struct
import subprocess
import sys
from functools import partial
from types import ModuleType

from scratchgen import diffusion, gradients, micro, ops, tree, vae
from scratchgen.data import load_fashion_mnist, load_idx, scale
from scratchgen.layers import mlp, time_embedding

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.image import imread


def in_float64(params):
    return [tuple(p.astype(np.float64) for p in layer) for layer in params]


def assert_gradient(loss, params, gradient, h=1e-6):
    """Compare the gradient with (L(p + h d) - L(p - h d)) / 2h, for each array p and three random directions d."""
    assert [[g.shape for g in layer] for layer in gradient] == [[p.shape for p in layer] for layer in params]
    rng = np.random.default_rng(1)
    for p, g in zip(sum(params, ()), sum(gradient, ()), strict=True):
        for _ in range(3):
            d = rng.standard_normal(p.shape)
            p += h * d
            above = loss()
            p -= 2 * h * d
            below = loss()
            p += h * d
            np.testing.assert_allclose(np.sum(g * d), (above - below) / (2 * h), rtol=1e-5, atol=1e-8)


@pytest.fixture
def small_vae(monkeypatch, rng):
    """Encoder, decoder, five images of six pixels, eps; all in float64. D = 3."""
    monkeypatch.setattr(micro, "D", 3)
    encoder = in_float64(micro.init_mlp(6, 5, 4, 2 * 3))
    decoder = in_float64(micro.init_mlp(3, 7, 6))
    return encoder, decoder, rng.random((5, 6)), rng.standard_normal((5, 3))


# ------------------------------------------------------------------------------------------------ by finite differences


def test_the_gradient_of_an_mlp(rng):
    params = in_float64(micro.init_mlp(4, 7, 5, 3))
    x, u = rng.standard_normal((6, 4)), rng.standard_normal((6, 3))

    def loss():
        return np.sum(u * micro.mlp(params, x)[0])

    gradient, d_x = micro.mlp_backward(params, micro.mlp(params, x)[1], u)
    assert_gradient(loss, params, gradient)
    assert d_x.shape == x.shape
    assert_gradient(loss, [(x,)], [(d_x,)])


def test_the_gradient_of_the_elbo(small_vae):
    encoder, decoder, x, eps = small_vae
    params = encoder + decoder
    assert_gradient(lambda: sum(micro.vae_loss(*small_vae)[:2]), params, micro.vae_loss(*small_vae)[2])


def test_the_gradient_of_the_diffusion_models_loss(rng):
    network = in_float64(micro.init_mlp(6 + 64, 5, 4, 6))
    batch = 2 * rng.random((5, 6)) - 1, np.array([[1], [2], [50], [150], [200]]), rng.standard_normal((5, 6))
    assert_gradient(lambda: micro.ddpm_loss(network, *batch)[0], network, micro.ddpm_loss(network, *batch)[1])


# --------------------------------------------------------------------------------------------- by another derivation


def test_the_reconstruction_is_the_bernoulli_likelihood(rng):
    l, x = 3 * rng.standard_normal((4, 6)), rng.integers(0, 2, (4, 6))
    p = 1 / (1 + np.exp(-l))
    probability = np.where(x == 1, p, 1 - p).prod(axis=1)  # of each image of black and white pixels
    assert micro.cross_entropy(l, x)[0] == pytest.approx(-np.log(probability).mean())
    far = np.float32([[-1000, 1000]])  # without overflow
    assert [micro.cross_entropy(far, np.float32([x]))[0] for x in ([0, 1], [1, 0])] == [0, 2000]


def test_the_kl_is_the_integral_that_it_stands_for(small_vae):
    encoder, decoder, x, eps = small_vae
    h, _ = micro.mlp(encoder, x)
    z = np.linspace(-15, 15, 20_001)
    expected = 0
    for mu, log_var in zip(h[:, :3].ravel(), h[:, 3:].ravel(), strict=True):
        log_q = -((z - mu) ** 2) / np.exp(log_var) / 2 - log_var / 2
        expected += np.trapezoid(np.exp(log_q) * (log_q + z**2 / 2), z) / math.sqrt(2 * math.pi)
    assert micro.vae_loss(*small_vae)[1] == pytest.approx(expected / len(x), rel=1e-6)


def test_z_has_the_moments_of_q(small_vae, monkeypatch, rng):
    encoder, decoder, x, _ = small_vae
    seen = []
    mlp = micro.mlp
    monkeypatch.setattr(micro, "mlp", lambda params, x: seen.append(x) or mlp(params, x))
    micro.vae_loss(encoder, decoder, np.repeat(x[:1], 200_000, axis=0), rng.standard_normal((200_000, 3)))
    h, _ = mlp(encoder, x[:1])
    z = seen[1]
    np.testing.assert_allclose(z.mean(axis=0), h[0, :3], atol=0.02)
    np.testing.assert_allclose(np.log(z.var(axis=0)), h[0, 3:], atol=0.02)


def test_x_t_is_what_t_small_steps_lead_to(monkeypatch, rng):
    """Eq. (2) of the paper, step by step, has the moments that Eq. (4) reaches at once."""
    seen = []
    denoise = micro.denoise
    monkeypatch.setattr(micro, "denoise", lambda network, x_t, t: seen.append(x_t) or denoise(network, x_t, t))
    network = in_float64(micro.init_mlp(1 + 64, 1))
    x_0 = np.full((50_000, 1), 0.7)
    x = x_0
    for t in range(1, micro.T + 1):
        x = np.sqrt(1 - micro.beta[t]) * x + np.sqrt(micro.beta[t]) * rng.standard_normal(x.shape)
        if t in (1, 10, 50, 200):
            micro.ddpm_loss(network, x_0, np.full(x.shape, t), rng.standard_normal(x.shape))
            x_t = seen[-1]
            assert x_t.mean() == pytest.approx(x.mean(), abs=0.02)
            assert x_t.std() == pytest.approx(x.std(), rel=0.02)
    assert abs(x.mean()) < 0.02 and x.std() == pytest.approx(1, abs=0.02)  # x_T is noise


@pytest.mark.parametrize("t", [2, 10, 100, 200])
def test_a_step_of_algorithm_2_draws_from_bayes_rule(t):
    """A network that always answers x_0 = 0.4: then x_{t-1} has the density q(x_t | x_{t-1}) q(x_{t-1} | x_0)."""
    beta = micro.beta.astype(np.float64)
    alpha_bar = np.cumprod(1 - beta)
    network = [(np.zeros((1 + 64, 1)), np.array([2 * np.arctanh(0.4)]))]  # 2 sigmoid(l) - 1 = 0.4
    x_t = np.array([[0.9]])
    x = np.linspace(-6, 6, 200_001)
    log_p = -((x_t[0] - np.sqrt(1 - beta[t]) * x) ** 2) / beta[t] / 2
    log_p -= (x - np.sqrt(alpha_bar[t - 1]) * 0.4) ** 2 / (1 - alpha_bar[t - 1]) / 2
    p = np.exp(log_p - log_p.max())
    mean = np.sum(p * x) / np.sum(p)
    std = np.sqrt(np.sum(p * (x - mean) ** 2) / np.sum(p))
    at_mean, one_std_above = (micro.p_sample(network, x_t, t, np.array([[z]])) for z in (0.0, 1.0))
    assert at_mean[0, 0] == pytest.approx(mean, abs=1e-4)
    assert (one_std_above - at_mean)[0, 0] == pytest.approx(std, rel=1e-3)


def test_the_last_step_is_the_predicted_image():
    network = [(np.zeros((1 + 64, 1)), np.array([2 * np.arctanh(0.4)]))]
    assert micro.p_sample(network, np.array([[0.9]]), 1, np.array([[5.0]])) == pytest.approx(0.4, abs=1e-4)


def test_adam_by_its_first_two_steps():
    """The first step is lr in size, whatever the gradient; the second by hand, for 1 and 3. And 0 moves nothing."""
    params, moments = [(np.zeros(3),)], [[(np.zeros(3), np.zeros(3))]]
    micro.adam_step(params, [(np.array([1.0, -0.01, 0.0]),)], moments, 1, lr=0.1)
    np.testing.assert_allclose(params[0][0], [-0.1, 0.1, 0], rtol=1e-5)
    micro.adam_step(params, [(np.array([3.0, -0.01, 0.0]),)], moments, 2, lr=0.1)
    m_hat = (0.9 * 0.1 * 1 + 0.1 * 3) / (1 - 0.9**2)
    v_hat = (0.999 * 0.001 * 1 + 0.001 * 9) / (1 - 0.999**2)
    np.testing.assert_allclose(params[0][0], [-0.1 - 0.1 * m_hat / math.sqrt(v_hat), 0.2, 0], rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ the whole page


@pytest.fixture(scope="module")
def images():
    return load_fashion_mnist(labels=False)["train_images"][:600]


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    """A folder with the first 600 training images, compressed."""
    path = tmp_path_factory.mktemp("few") / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">III", 600, 28, 28) + images.tobytes()))
    return path.parent


def test_the_page_is_short_and_needs_numpy_alone():
    text = (ROOT / "scratchgen" / "micro.py").read_text()
    assert len(text.splitlines()) <= 200
    imported = {name.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for name in node.names}
    assert imported == {"gzip", "struct", "sys", "zlib", "numpy"}
    assert not [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.ClassDef, ast.ImportFrom))]


def test_its_files_are_read_as_the_package_reads_them(folder):
    images = micro.read_idx(folder / "train-images-idx3-ubyte.gz")
    np.testing.assert_array_equal(images, load_idx(folder / "train-images-idx3-ubyte.gz"))
    assert images.shape == (600, 28, 28)


def test_its_picture_can_be_read(tmp_path, rng):
    grey = rng.integers(0, 256, (5, 8), np.uint8)
    micro.save_png(tmp_path / "grey.png", grey)
    np.testing.assert_array_equal(np.rint(255 * imread(tmp_path / "grey.png")), grey)


def run_alone(folder, *arguments, text=None):
    """The page, or another text, copied into a folder."""
    (folder / "micro.py").write_text(text or (ROOT / "scratchgen" / "micro.py").read_text())
    command = [sys.executable, "-W", "error", "micro.py", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


SMALLER = {  # what makes the training longer than a test may be -> less of it, and how often it stands there
    "range(1, 3501)": ("range(1, 2001)", 1),
    "range(1, 4501)": ("range(1, 501)", 1),
    "300, 300": ("100, 100", 2),
    "512, 512, 512": ("100, 100, 100", 1),
    "len(images), 128)": ("len(images), 32)", 1),
    "(128, D)": ("(32, D)", 1),
    "len(images), 256)": ("len(images), 32)", 1),
    "(256, ": ("(32, ", 2),
}


def smaller_page():
    text = (ROOT / "scratchgen" / "micro.py").read_text()
    for much, (less, count) in SMALLER.items():
        assert text.count(much) == count, much
        text = text.replace(much, less)
    return text


def test_its_training_draws_what_the_algorithms_say_and_the_vaes_images_are_above(folder, tmp_path, monkeypatch):
    """A dry run: the losses, the step, the networks and the sampler only note what they are given."""
    page = ModuleType("page")
    exec(smaller_page().replace("range(1, 2001)", "range(1, 201)"), vars(page))
    of_vae, of_ddpm, steps, codes = [], [], [], []
    page.vae_loss = lambda encoder, decoder, *batch: of_vae.append(batch) or (1.0, 2.0, None)
    page.ddpm_loss = lambda network, *batch: of_ddpm.append(batch) or (1.0, None)
    page.adam_step = lambda params, gradient, moments, step, lr: steps.append((step, lr))
    page.mlp = lambda params, z: (codes.append(z) or np.zeros((len(z), 784)), None)
    page.sample = lambda network, N: np.linspace(-1, 1, N)[:, None].repeat(784, axis=1)  # from black to white
    monkeypatch.chdir(tmp_path)
    page.main(folder)
    for batches, low in ((of_vae, 0), (of_ddpm, -1)):
        x, eps = (np.stack([batch[part] for batch in batches]) for part in (0, -1))
        assert (x.min(), x.max()) == (low, 1) and x.shape[1:] == (32, 784)
        assert len({images.tobytes() for images in x}) == len(x)  # others at each step
        assert len(np.unique(eps[:, 0, 0])) > 0.99 * len(eps) and len(np.unique(eps[0, :, 0])) == 32
        assert eps.mean() == pytest.approx(0, abs=0.01) and eps.std() == pytest.approx(1, abs=0.01)
    t = np.concatenate([batch[1] for batch in of_ddpm])
    assert t.shape == (500 * 32, 1) and set(t.ravel()) == set(range(1, 201))
    lr = [(step, 2e-3 * (1 - step / of)) for of, last in ((3500, 200), (4500, 500)) for step in range(1, last + 1)]
    np.testing.assert_allclose(steps, lr)
    (z,) = codes
    assert z.shape == (64, micro.D) and z.std() == pytest.approx(1, abs=0.1)
    upper, lower = np.split(imread(tmp_path / "micro.png"), 2)
    assert np.unique(upper) == pytest.approx(127 / 255)  # sigmoid(0)
    in_order = np.linspace(0, 1, 64).reshape(4, 1, 16, 1)  # each twice as large as 28 x 28
    assert np.abs(lower.reshape(4, 56, 16, 56) - in_order).max() < 1.1 / 255


def test_the_weights_begin_with_the_variance_that_it_names():
    (W, b), (V, c) = micro.init_mlp(400, 300, 500)
    assert not b.any() and not c.any() and W.dtype == b.dtype == np.float32
    assert [W.var() * 400, V.var() * 300] == pytest.approx([2, 2], rel=0.03)


def test_sample_takes_each_step_with_fresh_noise(monkeypatch):
    seen = []
    monkeypatch.setattr(micro, "p_sample", lambda network, x, t, z: seen.append((t, x, z)) or x / 2)
    micro.sample(None, 5)
    times, xs, zs = zip(*seen, strict=True)
    assert times == tuple(range(micro.T, 0, -1)) and xs[0].std() == pytest.approx(1, abs=0.05)
    assert all(np.array_equal(after, before / 2) for before, after in zip(xs, xs[1:], strict=False))
    z = np.array(zs)
    assert z.shape == (micro.T, 5, 784) and z.std() == pytest.approx(1, abs=0.01)
    assert len(np.unique(z)) == z.size  # no two are equal


def test_copied_anywhere_it_draws(folder, images, tmp_path):
    result = run_alone(tmp_path, folder, text=smaller_page())
    assert (result.returncode, result.stderr) == (0, "")
    said = [line.split(":")[0] for line in result.stdout.splitlines()]
    steps = [f"VAE, step {step} of 3500" for step in range(500, 2001, 500)]
    assert said == [*steps, "DDPM, step 250 of 4500", "DDPM, step 500 of 4500", "wrote micro.png"]
    picture = imread(tmp_path / "micro.png")
    assert picture.shape == (2 * 8 * 28, 2 * 16 * 28)
    for half in np.split(picture, 2):  # as bright as garments, and as much black and white
        assert [half.mean(), half.std()] == pytest.approx([images.mean() / 255, images.std() / 255], rel=0.3)


def test_without_its_data_it_says_so_in_one_line(tmp_path, folder):
    result = run_alone(tmp_path, "nowhere")
    assert result.returncode == 1 and re.fullmatch(r"micro\.py: .*nowhere/train-images.*\n", result.stderr)
    whole = (folder / "train-images-idx3-ubyte.gz").read_bytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(whole[: len(whole) // 2])
    result = run_alone(tmp_path, tmp_path)
    assert result.returncode == 1 and re.fullmatch(r"micro\.py: EOFError: .*\n", result.stderr)
    assert not (tmp_path / "micro.png").exists()


# -------------------------------------------------------------------- beside the package: not handed out


@pytest.fixture(scope="module")
def x(images):
    return scale(images[:32], 0, 1)  # (32, 28, 28, 1)


def layers(params):
    """Layers (W, b) as the package has them."""
    return [{"w": W, "b": b} for W, b in params]


def package_vae(encoder, decoder):
    *before, (W, b) = encoder
    D = len(b) // 2
    heads = {"mu": {"w": W[:, :D], "b": b[:D]}, "log_var": {"w": W[:, D:], "b": b[D:]}}
    return {"encoder": layers(before), **heads, "decoder": layers(decoder)}


def assert_same(params, expected):
    """The same numbers, but for the rounding of float32."""
    for found, wanted in zip(tree.leaves(params), tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_loss_and_gradient_are_the_packages_for_the_vae(x, rng):
    encoder = micro.init_mlp(784, 300, 300, 2 * micro.D)
    decoder = micro.init_mlp(micro.D, 300, 300, 784)
    encoder[-1][0][:] *= 0.1  # no log_var is near 2, where the package cuts it off
    eps = rng.standard_normal((len(x), micro.D), np.float32)

    def loss(params, batch):
        return vae.negative_elbo(partial(vae.mlp_encode, params), partial(vae.mlp_decode, params), batch)

    value, terms, expected = gradients.value_and_grad(loss)(package_vae(encoder, decoder), (x, eps))
    reconstruction, kl, gradient = micro.vae_loss(encoder, decoder, x.reshape(-1, 784), eps)
    assert [reconstruction, kl] == pytest.approx([terms["reconstruction"] * -1, terms["kl"]], rel=1e-5)
    assert reconstruction + kl == pytest.approx(value, rel=1e-5)
    assert_same(package_vae(gradient[:3], gradient[3:]), expected)


def test_loss_and_gradient_are_the_packages_for_the_diffusion_model(x, rng):
    schedule = diffusion.make_schedule("linear", micro.T)
    network = micro.init_mlp(784 + 64, 512, 512, 512, 784)
    x_0, t, eps = batch = diffusion.draw_batch(schedule, 2 * x - 1, rng)

    def loss(params, batch):
        x_0, t, eps = batch
        x_t = diffusion.q_sample(schedule, x_0, t, eps).reshape(len(x_0), -1)
        l = mlp(params, np.concatenate([x_t, time_embedding(t, 64)], axis=1))
        return -ops.mean(ops.bernoulli_log_likelihood(l.reshape(x_0.shape), (x_0 + 1) / 2))

    value, expected = gradients.value_and_grad(loss)(layers(network), batch)
    found, gradient = micro.ddpm_loss(network, x_0.reshape(-1, 784), t[:, None], eps.reshape(-1, 784))
    assert found == pytest.approx(value, rel=1e-5)
    assert_same(layers(gradient), expected)


@pytest.mark.parametrize("t", [200, 100, 2, 1])
def test_a_step_of_algorithm_2_is_the_packages(t, x, rng):
    schedule = diffusion.make_schedule("linear", micro.T)
    network = micro.init_mlp(784 + 64, 512, 784)
    noise, z = rng.standard_normal((2, *x.shape), np.float32)
    x_t = diffusion.q_sample(schedule, 2 * x - 1, np.full(len(x), t), noise)

    def eps_theta(x_t, t):
        l, _ = micro.denoise(network, x_t.reshape(-1, 784), t[:, None])
        x_0 = np.tanh(l / 2).reshape(x_t.shape)
        alpha_bar = diffusion.at(schedule["alpha_bar"], t)
        return (x_t - np.sqrt(alpha_bar) * x_0) / np.sqrt(1 - alpha_bar)

    expected = diffusion.p_sample(eps_theta, schedule, x_t, t, z).reshape(-1, 784)
    found = micro.p_sample(network, x_t.reshape(-1, 784), t, z.reshape(-1, 784))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
