"""Muon: orthogonalised momentum against a singular value decomposition, and what is stepped by what."""

import inspect
import re

import run_ddpm
import run_vae
from scratchgen import improved, tree, vae
from scratchgen.denoisers import DENOISERS
from scratchgen.muon import muon_step, orthogonalise
from scratchgen.optim import adam_step, init_moments

import numpy as np
import pytest
from conftest import ROOT, main_of


@pytest.mark.parametrize("norm", [100.0, 1e-7])
@pytest.mark.parametrize("shape", [(9, 40), (40, 9), (16, 16)])
def test_orthogonalise_is_its_polynomial_of_each_singular_value(rng, shape, norm):
    """s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5, five times, of the matrix divided by its norm and 1e-7. Of the norm, all
    are above 0.01, and so they end near one."""
    U, _, Vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    s = np.geomspace(30, 3, len(Vt))
    s *= norm / np.linalg.norm(s)
    expected = s / (norm + 1e-7)
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    G = U * s @ Vt
    np.testing.assert_allclose(orthogonalise(G), U * expected @ Vt, rtol=0, atol=1e-9)
    assert expected.min() > 0.6 and expected.max() < 1.3
    assert orthogonalise(G.astype(np.float32)).dtype == np.float32 and np.all(orthogonalise(0 * G) == 0)


@pytest.mark.parametrize(
    ("shape", "by_muon"),
    [((8, 64), True), ((7, 64), False), ((64, 200), True), ((65, 200), False), ((200, 65), False), ((64, 8), True)]
    + [((1, 1, 4, 16), False), ((1, 1, 16, 9), True), ((3, 3, 1, 9), True), ((3, 3, 16, 4), False), ((64,), False)],
)
def test_the_shorter_side_decides_who_steps_a_matrix(rng, shape, by_muon):
    """Of a kernel (K, K, C, O) that is the matrix (K K C, O). In its first step Adam moves all weights equally far."""
    p = np.zeros(shape)
    g = np.sign(rng.standard_normal(shape))
    moments = init_moments(p)
    muon_step(p, g, moments, 1, lr=0.1)
    by_adam = np.allclose(np.abs(p), 0.1), moments["v"].all(), moments["v"].any()
    assert by_adam == (not by_muon,) * 3


def test_muon_steps_matrices_by_nesterov_momentum_and_the_rest_by_adam(rng):
    matrices = {"k": (18, 12), "wide": (10, 40)}  # a kernel (3, 3, 2, 12) is the first
    params = {"k": rng.standard_normal((3, 3, 2, 12)), "wide": rng.standard_normal((10, 40))}
    params |= {"b": rng.standard_normal(12), "narrow": np.ones((20, 4))}
    gradients = [tree.map(lambda p: rng.standard_normal(p.shape), params) for _ in range(3)]
    by_muon, by_adam = (tree.map(np.copy, params) for _ in range(2))
    moments = init_moments(params)
    adam_moments = init_moments(params)
    m = dict.fromkeys(matrices, 0)
    for step, g in enumerate(gradients, 1):
        muon_step(by_muon, g, moments, step, lr=0.01, beta2=0.99)
        adam_step(by_adam, g, adam_moments, step, lr=0.01, beta2=0.99)
        for name, shape in matrices.items():
            m[name] = 0.95 * m[name] + g[name]
            direction = orthogonalise((g[name] + 0.95 * m[name]).reshape(shape))
            params[name] -= 0.01 * 0.2 * max(shape) ** 0.5 * direction.reshape(params[name].shape)
    for name in params:
        np.testing.assert_allclose(by_muon[name], (params if name in matrices else by_adam)[name], rtol=1e-12)


def stepped_by_muon(params):
    """The names of the arrays that Muon steps: those whose second moments stay zero."""
    moments = init_moments(params)
    muon_step(params, tree.map(np.ones_like, params), moments, 1, lr=0)
    return [n for n, v in zip(tree.names(params), tree.leaves(moments["v"]), strict=True) if not v.any()]


def test_the_texts_say_how_many_of_the_weights_it_steps(rng):
    def percent(params):
        sizes = {name: leaf.size for name, leaf in zip(tree.names(params), tree.leaves(params), strict=True)}
        return f"{round(100 * sum(sizes[name] for name in stepped_by_muon(params)) / sum(sizes.values()))} %"

    unet, _ = DENOISERS["unet"]
    with_blocks = percent(improved.init_denoiser(unet, rng, list(improved.ADDITIONS)))
    without = percent(improved.init_denoiser(unet, rng, ["v", "black"]))
    gated, conv = (percent(vae.VAES[arch][0](rng, 20)) for arch in ("gated", "conv"))
    words = f"Muon updates {with_blocks} of the weights, or {without} without the global blocks; "
    words += f"{gated} of the gated VAE, {conv} of the convolutional VAE, none of the MLP denoiser"
    assert words in re.sub(r"\n# ", " ", (ROOT / "scratchgen" / "muon.py").read_text())
    assert stepped_by_muon(DENOISERS["mlp"][0](rng)) == []
    with_classes, without_classes = (
        stepped_by_muon(improved.init_denoiser(unet, rng, [], classes)) for classes in (10, 0)
    )
    assert with_classes == [*without_classes, "labels/w"]
    quality = " ".join((ROOT / "docs" / "quality.md").read_text().split())
    assert f"({gated} and {conv} of the weights)" in quality


class FirstStep(Exception):
    """Raised in place of the first step of a training run."""


@pytest.mark.parametrize(
    ("script", "flags", "optimiser", "settings"),
    [
        (run_vae, ["--arch", "mlp"], adam_step, {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}),
        (run_vae, ["--arch", "gated"], muon_step, {"momentum": 0.95, "beta2": 0.999}),
        (run_vae, ["--arch", "conv"], muon_step, {"momentum": 0.95, "beta2": 0.999}),
        (run_ddpm, ["--additions", "v"], adam_step, {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}),
        (run_ddpm, ["--additions", "muon"], muon_step, {"momentum": 0.95, "beta2": 0.99}),
    ],
)
def test_what_a_script_steps_with(script, flags, optimiser, settings, small_data, tmp_path, monkeypatch):
    for step in (adam_step, muon_step):

        def first_step(*args, step=step, **more):
            call = inspect.signature(step).bind(*args, **more)
            call.apply_defaults()
            assert step is optimiser and call.arguments.items() >= settings.items()
            raise FirstStep

        monkeypatch.setattr(script, step.__name__, first_step)
    with pytest.raises(FirstStep):
        flags = [*flags, "--data", small_data, "--train-images", 2, "--batch-size", 2, "--workers", 1]
        main_of(script, *flags, "--epochs", 1, "--out", tmp_path)
