"""What the run scripts pass to whom: the right images under the right titles, flags that arrive, weights that count.

The scripts run in this process, with some functions wrapped so that their arguments are kept.
"""

import json
import re
from functools import partial
from pathlib import Path

import run_ddpm
import run_vae
from scratchgen import diffusion, plots, tree, vae
from scratchgen.data import load_idx, scale
from scratchgen.optim import cosine_decay

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def record(monkeypatch):
    """Wrap a function of a module so that the arguments of its calls are kept, and return the list of them."""

    def wrap(module, name):
        original, calls = getattr(module, name), []

        def recording(*args, **kwargs):
            calls.append(tree.map(lambda a: a.copy() if isinstance(a, np.ndarray) else a, args))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, recording)
        return calls

    return wrap


@pytest.fixture
def call(monkeypatch, small_data):
    def main(module, *flags):
        monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", "--data", str(small_data), *map(str, flags)])
        with pytest.warns(UserWarning, match="not the published"):
            module.main()

    return main


@pytest.fixture
def test_images(small_data):
    return load_idx(small_data / "t10k-images-idx3-ubyte")[..., None]


def rewrite(folder, change):
    """Apply ``change(name, array)`` to each array of a checkpoint."""
    with np.load(folder / "checkpoint.npz") as file:
        arrays = {name: file[name] if name == "state" else change(name, file[name]) for name in file.files}
    np.savez(folder / "checkpoint.npz", **arrays)


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_vae_script(record, call, test_images, tmp_path):
    steps_taken, latents = record(run_vae, "muon_step"), record(plots, "plot_latents")
    reconstructions, grids, losses = (record(plots, name) for name in ("reconstructions", "grid", "vae_loss"))
    flags = [
        "--latent-dim",
        5,
        "--epochs",
        2,
        "--batch-size",
        16,
        "--train-images",
        50,
        "--lr",
        0.01,
        "--weight-decay",
        0.2,
        "--out",
        tmp_path,
    ]
    call(run_vae, *flags)
    steps = 2 * 4  # 50 images are 16 + 16 + 16 + 2
    assert [args[3] for args in steps_taken] == list(range(1, steps + 1))
    assert [args[4:] for args in steps_taken] == [(cosine_decay(step, steps, 0.01), 0.2) for step in range(steps)]

    _, encode, decode = vae.VAES["mlp"]
    with np.load(tmp_path / "checkpoint.npz") as file:
        params = tree.map(lambda name: file[f"params/{name}"], names_as_tree(steps_taken[-1][0]))
    x = scale(test_images, 0, 1)
    mu, log_var = encode(params, x)
    ((shown, decoded),) = reconstructions
    np.testing.assert_array_equal(shown, x)  # the small test set has 40 images, the figure shows 40
    np.testing.assert_allclose(decoded, vae.generate(partial(decode, params), mu), atol=1e-5)
    samples = next(args[0] for args in grids if "N(0, I)" in args[2])
    assert len(samples) == 100 and samples.std(axis=0).max() > 0

    kl = vae.kl_per_dimension(mu, log_var).mean(axis=0)
    assert sorted(latents[0][2:]) == sorted(np.argsort(kl)[-2:])
    call(run_vae, *flags, "--resume", "--latents", 3, 1)
    assert latents[1][1:] == (5, 3, 1) and (tmp_path / "latents_3_1.png").exists()

    m = metrics(tmp_path)
    assert m["parameters"] == tree.size(params) and m["seconds"] > 0
    assert m["entropy_floor"] == losses[0][1] == pytest.approx(vae.entropy_floor(x))
    assert m["kl"] == pytest.approx(kl.sum(), rel=1e-4)


def test_beta_and_warm_up_reach_the_loss(record, call, tmp_path):
    losses = record(vae, "negative_elbo")
    flags = ["--latent-dim", 2, "--batch-size", 16, "--train-images", 64, "--workers", 1, "--out", tmp_path]
    call(run_vae, *flags, "--epochs", 3, "--beta", 4, "--warm-up", 2)
    assert [args[3] for args in losses] == [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4, 4, 4, 4]
    losses.clear()
    call(run_vae, *flags, "--epochs", 1)
    assert [args[3] for args in losses] == [1] * 4


def names_as_tree(params):
    names = iter(tree.names(params))
    return tree.map(lambda _: next(names), params)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpm_script(schedule, record, call, test_images, tmp_path):
    rows, grids, gifs = (record(plots, name) for name in ("row_of_times", "grid", "save_gif"))
    losses, sampled = record(plots, "ddpm_loss"), record(diffusion, "sample")
    flags = ["--T", 20, "--epochs", 2, "--batch-size", 16, "--train-images", 40, "--schedule", schedule]
    flags += ["--ema", 0.5, "--out", tmp_path]
    call(run_ddpm, *flags)
    (noisy, forward_times, _), (path, reverse_times, _) = rows
    assert forward_times == reverse_times == [20, 10, 5, 2, 1, 0]
    s, x_0 = diffusion.make_schedule(schedule, 20), scale(test_images[0], -1, 1)
    np.testing.assert_allclose(noisy[-1], x_0, atol=1e-6)
    for x_t, t in zip(noisy[:-1], forward_times[:-1], strict=True):  # one and the same noise at every time
        eps = (x_t - s["signal"][t] * x_0) / s["noise"][t]
        np.testing.assert_allclose(eps, (noisy[0] - s["signal"][20] * x_0) / s["noise"][20], atol=1e-4)

    first, second, samples = (args[0] for args in grids)
    assert len(first) == len(second) == 32 and len(samples) == 64
    np.testing.assert_array_equal(sampled[0][2], sampled[1][2])  # both previews start from the same noise
    assert np.abs(first - second).max() > 0
    assert losses[0][1].tolist() == np.repeat(np.arange(1, 21), 2).tolist()  # 40 test images, each t twice
    np.testing.assert_array_equal(path[-1], samples[0])
    assert all(np.abs(a - b).max() > 0.01 for a, b in zip(path, path[1:], strict=False))
    (frames, columns, _), *_ = gifs
    assert len(frames) == 21 and columns == 4
    np.testing.assert_array_equal(frames[-1], samples[:16])

    m = metrics(tmp_path)
    assert m["alpha_bar_T"] == s["alpha_bar"][-1]
    assert m["prior_kl"] == pytest.approx(diffusion.prior_kl(s, scale(test_images, -1, 1)).mean(), rel=1e-6)
    if schedule == "cosine":
        return
    # Samples and test loss come from the averaged weights, and from them alone.
    with np.load(tmp_path / "checkpoint.npz") as file:
        assert np.any(file["ema/outlet/w"] != file["params/outlet/w"])
    rewrite(tmp_path, lambda name, a: 0 * a if name.startswith("params/") else a)
    call(run_ddpm, *flags, "--resume")
    np.testing.assert_array_equal(grids[-1][0], samples)
    assert metrics(tmp_path)["test_loss"] == m["test_loss"]
    rewrite(tmp_path, lambda name, a: 0 * a if name.startswith("ema/") else a)
    call(run_ddpm, *flags, "--resume")
    assert np.abs(grids[-1][0] - samples).max() > 0.01 and metrics(tmp_path)["test_loss"] != m["test_loss"]


def test_the_diffusion_model_is_trained_on_the_weighted_loss(record, call, tmp_path):
    losses = record(diffusion, "weighted_loss")
    flags = ["--T", 5, "--arch", "mlp", "--batch-size", 16, "--train-images", 40, "--workers", 1, "--out", tmp_path]
    call(run_ddpm, *flags, "--epochs", 2)
    assert [len(args[2][0]) for args in losses] == [16, 16, 8] * 2  # the images of each step, and of nothing else


def test_an_image_that_cannot_become_noise_is_warned_of(call, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(diffusion.SCHEDULES, "linear", lambda T: np.full(T, 0.01))
    call(run_ddpm, "--T", 5, "--epochs", 1, "--train-images", 16, "--arch", "mlp", "--out", tmp_path)
    assert "warning" in capsys.readouterr().out


@pytest.mark.parametrize(("module", "T"), [(run_ddpm, 1), (run_ddpm, 3)])
def test_very_few_steps_work_too(module, T, record, call, tmp_path):
    rows = record(plots, "row_of_times")
    call(module, "--T", T, "--epochs", 1, "--train-images", 16, "--arch", "mlp", "--out", tmp_path)
    times = rows[0][1]
    assert len(times) == 6 and times[0] == T and times[-1] == 0 and times == sorted(times, reverse=True)


def test_a_test_set_smaller_than_the_figures(small_data, monkeypatch, tmp_path):
    for path in small_data.iterdir():
        content = path.read_bytes()
        if path.name.startswith("t10k"):  # 7 of the 40
            size = 784 if "images" in path.name else 1
            head = 16 if "images" in path.name else 8
            content = content[:4] + (7).to_bytes(4, "big") + content[8:head] + content[head : head + 7 * size]
        (tmp_path / path.name).write_bytes(content)
    flags = ["--data", tmp_path, "--epochs", 1, "--train-images", 16, "--out", tmp_path / "out"]
    for module, more in ((run_vae, []), (run_ddpm, ["--T", 30, "--arch", "mlp"])):
        monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, [*flags, *more])])
        with pytest.warns(UserWarning, match="not the published"):
            module.main()
    assert (tmp_path / "out" / "reconstructions.png").exists() and (tmp_path / "out" / "trajectory.png").exists()


def test_the_breakpoint_of_the_readme_is_where_it_says():
    readme, code = ((ROOT / name).read_text() for name in ("README.md", "scratchgen/vae.py"))
    line = int(re.search(r"\(Pdb\) b scratchgen/vae.py:(\d+)", readme)[1])
    assert code.splitlines()[line - 1].strip() == "return reconstruction, kl"
