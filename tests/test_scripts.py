"""What the run scripts pass to whom: the right images under the right titles, flags that arrive, weights that count.

The scripts run in this process, with some functions wrapped so that their arguments are kept.
"""

import itertools
import json
import os
import signal
from functools import partial
from types import SimpleNamespace

import run_ddpm
import run_vae
from scratchgen import data, denoisers, diffusion, improved, plots, samplers, tree, vae
from scratchgen.data import load_idx, scale
from scratchgen.evaluate import __main__ as evaluate
from scratchgen.machinery import blas, checkpoint, cli, parallel
from scratchgen.machinery.run import INIT, NOISE, ORDER, SAMPLES, TEST, Run, rng_for
from scratchgen.optim import cosine_decay
from scratchgen.samplers import SamplerConfig
from scratchgen.trained import load_run

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import grad
from conftest import load, main_of, script


@pytest.fixture
def record(monkeypatch):
    """Wrap a function of a module, or of a dict, so that the arguments of its calls are kept; return their list."""

    def wrap(place, name):
        original, calls = place[name] if isinstance(place, dict) else getattr(place, name), []

        def recording(*args, **kwargs):
            calls.append(tree.map(lambda a: a.copy() if isinstance(a, np.ndarray) else a, args))
            return original(*args, **kwargs)

        (monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr)(place, name, recording)
        return calls

    return wrap


@pytest.fixture
def call(small_data):
    return lambda module, *flags: main_of(module, *flags, "--data", small_data)


@pytest.fixture
def test_images(small_data):
    return load_idx(small_data / "t10k-images-idx3-ubyte")[..., None]


def rewrite(folder, change):
    """Apply ``change(name, array)`` to each array of a checkpoint."""
    arrays, state = checkpoint.load(folder / "checkpoint.npz")
    arrays = {name: change(name, array) for name, array in arrays.items()}
    checkpoint.save(folder / "checkpoint.npz", arrays, state)


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("arch", vae.VAES)
def test_vae_script(arch, record, call, test_images, tmp_path):
    steps_taken = record(run_vae, "adam_step" if arch == "mlp" else "muon_step")
    latents = record(plots, "plot_latents")
    reconstructions, grids, losses = (record(plots, name) for name in ("reconstructions", "grid", "vae_loss"))
    flags = ["--arch", arch, "--latent-dim", 5, "--epochs", 2, "--batch-size", 16, "--train-images", 50]
    flags += ["--lr", 0.01, "--workers", 1, "--out", tmp_path]  # one rank, which steps all the weights
    call(run_vae, *flags)
    steps = 2 * 4  # 50 images are 16 + 16 + 16 + 2
    assert [args[3] for args in steps_taken] == list(range(1, steps + 1))
    assert [args[4:] for args in steps_taken] == [(cosine_decay(step, steps, 0.01),) for step in range(1, steps + 1)]

    _, encode, decode = vae.VAES[arch]
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


def trained_by_hand(loss, params, batches, steps, peak, decay=1.0):
    """Adam and the moving average as their papers have them, in float64, on whole minibatches.

    ``batches`` are those of all epochs; returns the weights, their average, and the loss before each step.
    """
    params = tree.map(np.float64, params)
    m, v, average, losses = tree.map(np.zeros_like, params), tree.map(np.zeros_like, params), params, []
    for step, batch in enumerate(batches, 1):
        losses.append(float(loss(params, batch)))
        g = grad(loss)(params, batch)
        m = tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, g)
        rate = peak * min(1, step / max(1, steps // 10)) * (1 + np.cos(np.pi * (step - 1) / steps)) / 2

        def adam(p, m, v, rate=rate, step=step):
            return p - rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)

        params = tree.map(adam, params, m, v)
        d = min(decay, (1 + step) / (10 + step))
        average = tree.map(lambda a, p, d=d: d * a + (1 - d) * p, average, params)
    return params, average, losses


def orders(seed, count, batch_size, epochs):
    """The numbers of the images in each minibatch of a run."""
    for epoch in range(epochs):
        order = rng_for(seed, ORDER, epoch).permutation(count)
        yield from (order[start : start + batch_size] for start in range(0, count, batch_size))


def test_a_run_of_the_vae_is_its_equations_and_nothing_else(call, small_data, test_images, tmp_path):
    """A second implementation, in float64 and without shards: the same numbers from the same draws."""
    flags = ["--latent-dim", 3, "--epochs", 2, "--batch-size", 16, "--train-images", 40, "--seed", 7, "--lr", 0.004]
    call(run_vae, *flags, "--beta", 1.5, "--out", tmp_path)
    x_train = load_idx(small_data / "train-images-idx3-ubyte")[:40, ..., None] / 255
    x_test = test_images / 255
    rng = rng_for(7, NOISE)
    init = rng_for(7, INIT)

    def terms(params, x, eps):
        mu, log_var = vae.mlp_encode(params, x)
        logits = vae.mlp_decode(params, mu + anp.exp(log_var / 2) * eps)
        first = anp.sum(x * logits - anp.log(1 + anp.exp(logits))) / len(x)
        return first, anp.sum(mu**2 + anp.exp(log_var) - 1 - log_var) / 2 / len(x)

    def loss(params, batch):
        first, second = terms(params, *batch)
        return 1.5 * second - first

    numbers = list(orders(7, 40, 16, 2))
    batches = [(x_train[n], rng.standard_normal((len(n), 3), dtype=np.float32)) for n in numbers]
    params, _, losses = trained_by_hand(loss, vae.init_mlp_vae(init, 3), batches, 6, 0.004)
    eps_test = rng_for(7, TEST).standard_normal((40, 3), dtype=np.float32)
    first, second = terms(params, x_test, eps_test)
    found, log = metrics(tmp_path), load(tmp_path / "checkpoint.npz")[1]["log"]
    assert (found["reconstruction"], found["kl"]) == pytest.approx((first, second), rel=1e-4)
    assert found["elbo"] == pytest.approx(first - second, rel=1e-4)
    for row, of_epoch in zip(log, (losses[:3], losses[3:]), strict=True):
        mean = np.average(of_epoch, weights=[16, 16, 8])
        assert 1.5 * row["train_kl"] - row["train_reconstruction"] == pytest.approx(mean, rel=1e-4)
        assert row["train_elbo"] == pytest.approx(row["train_reconstruction"] - row["train_kl"], rel=1e-6)


def test_a_run_of_the_diffusion_model_is_its_equations_and_nothing_else(call, small_data, test_images, tmp_path):
    """Algorithm 1 a second time, in float64 and without shards, and the test loss of the averaged weights."""
    T, N = 30, 40
    flags = ["--T", T, "--arch", "mlp", "--additions", "none", "--epochs", 2, "--batch-size", 16, "--lr", 0.004]
    call(run_ddpm, *flags, "--train-images", N, "--seed", 7, "--ema", 0.3, "--out", tmp_path)
    x_train = load_idx(small_data / "train-images-idx3-ubyte")[:N, ..., None] / 127.5 - 1
    x_test = test_images / 127.5 - 1
    rng = rng_for(7, NOISE)
    init = rng_for(7, INIT)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, T) * 1000 / T)

    def errors(params, x_0, t, eps):
        a = alpha_bar[t - 1].reshape(-1, 1, 1, 1)
        return (eps - denoisers.mlp_denoiser(params, np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps, t)) ** 2

    def loss(params, batch):
        return anp.sum(errors(params, *batch)) / batch[0].size

    batches = []
    for n in orders(7, N, 16, 2):
        t = rng.integers(1, T + 1, size=len(n))
        batches.append((x_train[n], t, rng.standard_normal((len(n), 28, 28, 1), dtype=np.float32)))
    _, average, losses = trained_by_hand(loss, denoisers.init_mlp_denoiser(init), batches, 6, 0.004, decay=0.3)
    t_test = np.array([1 + n * T // N for n in range(N)])
    eps_test = rng_for(7, TEST).standard_normal(x_test.shape, dtype=np.float32)
    by_image = errors(average, x_test, t_test, eps_test).mean(axis=(1, 2, 3))
    log = load(tmp_path / "checkpoint.npz")[1]["log"]
    assert metrics(tmp_path)["test_loss"] == pytest.approx(by_image.mean(), rel=1e-4)
    assert log[-1]["test_loss"] == pytest.approx(by_image[::5].mean(), rel=1e-4)
    for row, of_epoch in zip(log, (losses[:3], losses[3:]), strict=True):
        assert row["train_loss"] == pytest.approx(np.average(of_epoch, weights=[16, 16, 8]), rel=1e-4)


def test_the_strip_has_the_six_times_of_the_sheet(record, call, tmp_path, monkeypatch):
    quick = (lambda rng, inputs: {"w": np.ones(1, np.float32)}), (lambda params, x, t, labels: params["w"] * x)
    monkeypatch.setitem(run_ddpm.DENOISERS, "mlp", quick)
    strips = record(plots, "row_of_times")
    flags = ["--T", 200, "--arch", "mlp", "--additions", "none", "--epochs", 1, "--train-images", 16]
    call(run_ddpm, *flags, "--workers", 1, "--out", tmp_path)
    times = [200, 100, 50, 20, 10, 0]
    assert [each for _, each, _ in strips] == [times[::-1], times]  # the forward process begins at 0


def test_beta_reaches_the_loss(record, call, tmp_path):
    losses = record(vae, "negative_elbo")
    shards = 16 // parallel.shard_size(16, blas.available_cores())
    flags = ["--latent-dim", 2, "--batch-size", 16, "--train-images", 64, "--workers", 1, "--out", tmp_path]
    call(run_vae, *flags, "--epochs", 2, "--beta", 4)
    assert [args[3] for args in losses] == [4] * 8 * shards
    losses.clear()
    call(run_vae, *flags, "--epochs", 1)
    assert [args[3] for args in losses] == [1] * 4 * shards


def names_as_tree(params):
    names = iter(tree.names(params))
    return tree.map(lambda _: next(names), params)


@pytest.mark.parametrize(("schedule", "additions"), [("linear", "all"), ("cosine", "all"), ("linear", "none")])
def test_ddpm_script(schedule, additions, record, call, test_images, tmp_path):
    rows, grids, gifs = (record(plots, name) for name in ("row_of_times", "grid", "save_gif"))
    losses = record(plots, "ddpm_loss")
    sampled, not_sampled = record(samplers, "sample"), record(diffusion, "sample")
    if additions == "none":  # Algorithm 2 to the letter
        sampled, not_sampled = not_sampled, sampled
    flags = ["--T", 20, "--epochs", 2, "--batch-size", 16, "--train-images", 40, "--schedule", schedule]
    flags += ["--additions", additions, "--ema", 0.5, "--out", tmp_path, "--workers", 1]
    call(run_ddpm, *flags)
    # Two previews of one shard of 32 images, 16 by Algorithm 2 for strip and animation, and two shards of samples.
    assert [len(args[2]) for args in sampled] == [32, 32, 16, 32, 32] and not_sampled == []
    (noisy, forward_times, _), (path, reverse_times, _) = rows
    assert forward_times[::-1] == reverse_times == [20, 10, 5, 2, 1, 0]
    noisy, forward_times = noisy[::-1], forward_times[::-1]
    s, x_0 = diffusion.make_schedule(schedule, 20), scale(test_images[0], -1, 1)
    signal, noise = s["sqrt_alpha_bar"], s["sqrt_one_minus_alpha_bar"]
    np.testing.assert_allclose(noisy[-1], x_0, atol=1e-6)
    for x_t, t in zip(noisy[:-1], forward_times[:-1], strict=True):  # one and the same noise at every time
        eps = (x_t - signal[t] * x_0) / noise[t]
        np.testing.assert_allclose(eps, (noisy[0] - signal[20] * x_0) / noise[20], atol=1e-4)

    first, both, samples = (args[0].astype(int) for args in grids[:3])
    assert (len(first), len(both), len(samples)) == (10, 20, 64)  # a row an epoch
    assert [args[5] for args in grids[:2]] == [["epoch 1"], ["epoch 1", "epoch 2"]]
    for other in (1, 3):  # both previews, and the samples, start from the same noise
        np.testing.assert_array_equal(sampled[0][2], sampled[other][2])
    np.testing.assert_array_equal(first, both[:10])
    assert np.abs(both[10:] - first).max() > 0
    assert "diffusion model, unet: " in grids[2][2] and "20 steps" in grids[2][2]
    assert losses[0][1].tolist() == np.repeat(np.arange(1, 21), 2).tolist()  # 40 test images, each t twice
    assert all(np.abs(a - b).max() > 0.01 for a, b in zip(path, path[1:], strict=False))
    (frames, columns, _), *_ = gifs
    assert list(frames) == list(range(20, -1, -1)) and columns == 4
    np.testing.assert_array_equal(frames[0][0], path[-1])
    model = load_run(tmp_path)
    best = SamplerConfig("ddpm", 20) if additions == "none" else SamplerConfig("sde-dpm++", 20, improved.GUIDANCE)
    image = model.sample(32, rng_for(0, SAMPLES, 0), config=best)
    np.testing.assert_array_equal(samples[:32], np.round(image * 255))

    m = metrics(tmp_path)
    assert m["alpha_bar_T"] == s["alpha_bar"][-1]
    assert m["prior_kl"] == pytest.approx(diffusion.prior_kl(s, scale(test_images, -1, 1)).mean(), rel=1e-6)
    if schedule == "cosine":
        return
    # Samples and test loss come from the averaged weights, and from them alone.
    with np.load(tmp_path / "checkpoint.npz") as file:
        assert np.any(file["ema/conv_out/w"] != file["params/conv_out/w"])
    rewrite(tmp_path, lambda name, a: 0 * a if name.startswith("params/") else a)
    call(run_ddpm, *flags, "--resume")
    np.testing.assert_array_equal(grids[-2][0], samples)  # the last shows the nearest training images
    assert metrics(tmp_path)["test_loss"] == m["test_loss"]
    rewrite(tmp_path, lambda name, a: 0 * a if name.startswith("ema/") else a)
    call(run_ddpm, *flags, "--resume")
    assert np.abs(grids[-2][0] - samples).max() > 1 and metrics(tmp_path)["test_loss"] != m["test_loss"]


@pytest.mark.parametrize("additions", ["none", "all"])
@pytest.mark.parametrize("arch", denoisers.DENOISERS)
def test_every_network_learns_with_the_default_rate(arch, additions, call, tmp_path, capsys):
    """Without a skip the MLP alone learned nothing but to predict 0, which has a loss of 1."""
    flags = ["--arch", arch, "--additions", additions, "--T", 20, "--batch-size", 8, "--out", tmp_path]
    model = call(run_ddpm, *flags, "--epochs", 2, "--workers", 2)
    assert model.log[-1]["test_loss"] < 0.5 and model.log[-1]["train_loss"] < 0.5
    assert "predicting no noise" not in capsys.readouterr().out


@pytest.mark.parametrize("arch", vae.VAES)
def test_every_vae_learns_with_the_default_rate(arch, call, tmp_path):
    flags = ["--arch", arch, "--latent-dim", 4, "--batch-size", 16, "--epochs", 4, "--out", tmp_path]
    model = call(run_vae, *flags)
    assert model.log[-1]["test_elbo"] > -400 and model.sample(2).shape == (2, 28, 28, 1)  # 543 are those of grey 1/2


def test_a_run_that_learns_nothing_says_so(call, tmp_path, capsys):
    flags = ["--T", 2, "--arch", "mlp", "--additions", "none", "--epochs", 2, "--train-images", 16, "--out", tmp_path]
    call(run_ddpm, *flags, "--lr", 1e-9)
    assert capsys.readouterr().out.count("predicting no noise at all has a loss of 1") == 1  # after the first epoch


@pytest.mark.parametrize("T", [1, 2])
def test_a_T_of_one_or_two_shows_what_there_is(T, record, call, tmp_path):
    strips, gifs = record(plots, "row_of_times"), record(plots, "save_gif")
    call(run_ddpm, "--T", T, "--arch", "mlp", "--epochs", 1, "--train-images", 16, "--out", tmp_path)
    expected = list(range(T, -1, -1))
    assert [times for _, times, _ in strips] == [expected[::-1], expected] and list(gifs[0][0]) == expected


def test_previews_are_of_the_last_twelve_epochs_and_survive_a_stop(record, call, tmp_path):
    grids = record(plots, "grid")
    flags = ["--T", 2, "--arch", "mlp", "--epochs", 14, "--train-images", 16, "--out", tmp_path]
    call(run_ddpm, *flags)
    shown = [args for args in grids if args[2].startswith("previews: ")]
    assert [len(args[5]) for args in shown] == [*range(1, 13), 12, 12]
    assert shown[-1][5] == [f"epoch {n}" for n in range(3, 15)]
    np.testing.assert_array_equal(shown[-1][0][:110], shown[-2][0][10:])
    arrays, _ = load(tmp_path / "checkpoint.npz")
    assert arrays["previews"].shape == (12, 10, 28, 28, 1)
    np.testing.assert_array_equal(arrays["previews"][14 % 12], shown[-1][0][-10:])


def test_a_preview_that_cannot_be_written_ends_no_training(call, tmp_path, monkeypatch):
    save = plots.save

    def viewer(figure, path):
        if path.name == "preview.png":
            raise PermissionError(13, "Permission denied", str(path))
        save(figure, path)

    monkeypatch.setattr(plots, "save", viewer)
    flags = ["--T", 2, "--arch", "mlp", "--epochs", 2, "--train-images", 16, "--out", tmp_path]
    with pytest.warns(UserWarning, match="preview.png: Permission denied, and so it stays as it is"):
        model = call(run_ddpm, *flags)
    assert len(model.log) == 2 and (tmp_path / "samples.png").exists()


def test_a_rank_that_dies_while_a_preview_is_drawn_is_no_preview_that_cannot_be_written(call, tmp_path, monkeypatch):
    """ChildProcessError is an OSError, too."""

    def killed(*args, **options):
        raise ChildProcessError(parallel.KILLED)

    monkeypatch.setattr(run_ddpm, "draw", killed)
    with pytest.raises(ChildProcessError, match="was killed"):
        call(run_ddpm, "--T", 2, "--arch", "mlp", "--epochs", 1, "--train-images", 16, "--out", tmp_path)


def test_the_guide_is_the_average_as_it_was_after_a_quarter_of_the_steps(record, call, tmp_path):
    averages = record(run_ddpm, "ema_step")
    flags = ["--T", 5, "--arch", "mlp", "--batch-size", 4, "--train-images", 40, "--workers", 1, "--out", tmp_path]
    call(run_ddpm, *flags, "--epochs", 2)
    arrays, _ = load(tmp_path / "checkpoint.npz")
    after = averages[5][0]  # the average that the sixth step changes, as it was before: after 5 of 20
    assert [args[2] for args in averages] == list(range(1, 21))
    np.testing.assert_array_equal(arrays["early/mlp/0/w"], after["mlp"][0]["w"])
    before_and_next = (averages[step][0]["mlp"][0]["w"] for step in (4, 6))
    assert all(np.any(arrays["early/mlp/0/w"] != other) for other in before_and_next)
    call(run_ddpm, *flags, "--epochs", 1, "--additions", "v")
    assert not any(name.startswith("early/") for name in load(tmp_path / "checkpoint.npz")[0])


def test_with_classes_the_network_is_told_the_labels_but_for_a_tenth(record, call, small_data, tmp_path):
    told = record(denoisers, "label_embedding")
    flags = ["--T", 5, "--batch-size", 16, "--train-images", 100, "--epochs", 3, "--workers", 1, "--classes"]
    call(run_ddpm, *flags, "--out", tmp_path)
    config = load(tmp_path / "checkpoint.npz")[1]["config"]
    assert config["classes"] is True
    labels = load_idx(small_data / "train-labels-idx1-ubyte")[:100]
    first = np.concatenate([args[1] for args in told])[:100]  # of the first epoch, in the order of its minibatches
    order = rng_for(0, ORDER, 0).permutation(100)
    dropped = first == -1
    assert 1 <= dropped.sum() <= 25
    np.testing.assert_array_equal(first[~dropped], labels[order][~dropped])


def test_the_network_sees_the_group_whose_mean_is_nearest_to_each_image(record, call, small_data, tmp_path):
    told = record(improved.Groups, "means_of")
    flags = ["--T", 5, "--arch", "mlp", "--batch-size", 16, "--train-images", 100, "--epochs", 1, "--workers", 1]
    call(run_ddpm, *flags, "--out", tmp_path)
    first = np.concatenate([args[1] for args in told])[:100]  # in the order of the minibatches
    means = load(tmp_path / "checkpoint.npz")[0]["groups/means"].reshape(1, -1, 784).astype(float)
    images = load_idx(small_data / "train-images-idx3-ubyte")[:100].reshape(100, 1, 784) / 127.5 - 1
    squares = ((images - means) ** 2).sum(axis=2)[rng_for(0, ORDER, 0).permutation(100)]
    dropped = first == -1
    assert 1 <= dropped.sum() <= 25 and len(np.unique(first)) > 20
    # Of so few images several means are equal, and rounding decides between them.
    of_first = squares[np.arange(100), first]
    np.testing.assert_allclose(of_first[~dropped], squares.min(axis=1)[~dropped], rtol=1e-4, atol=1e-3)


def test_classes_need_labels_and_a_network_that_knows_of_them(call, small_data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_ddpm.main(["--classes", "--arch", "mlp", "--out", str(tmp_path)])
    assert "--classes is for --arch unet, not mlp" in capsys.readouterr().err
    for path in small_data.glob("*images*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(data.DataError, match="labels"):
        run_ddpm.main(["--classes", "--data", str(tmp_path), "--out", str(tmp_path / "out")])


@pytest.mark.skipif(not parallel.CAN_FORK, reason="workers are threads here")
@pytest.mark.parametrize(
    "flags", [(run_vae,), (run_ddpm, "--T", 5), (run_ddpm, "--T", 5, "--classes")], ids=["vae", "ddpm", "classes"]
)
def test_a_run_forks_each_rank_once_and_no_step_does(flags, record, call, tmp_path):
    forks, (module, *more) = record(parallel.Ranks, "fork"), flags
    more += ["--batch-size", 16, "--epochs", 1, "--workers", 2, "--out", tmp_path]
    for images in (32, 128):
        call(module, *more, "--train-images", images)
        assert len(forks) == 1
        forks.clear()


RUNS = {
    "vae": (run_vae, "adam_step", ["--latent-dim", 2]),
    "vae, Muon": (run_vae, "muon_step", ["--latent-dim", 2, "--arch", "gated"]),
    "ddpm": (run_ddpm, "adam_step", ["--T", 5, "--arch", "mlp", "--additions", "none"]),
    "ddpm, Muon": (run_ddpm, "muon_step", ["--T", 5, "--arch", "mlp"]),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("run", RUNS)
def test_every_hundredth_step_begins_without_denormal_moments(run, workers, call, monkeypatch, tmp_path):
    """After every step one is put into each leaf of the moments, and before the next it is looked for: by the rank that
    owns the leaf, whose mistakes come to rank 0."""
    (module, name, flags), steps, denormal = RUNS[run], [], np.float32(1e-40)
    step_of = getattr(module, name)

    def planting(params, gradient, moments, step, *rest, **more):
        def look(g, *both):
            expected = denormal if step % 100 else 0
            assert step == 1 or [moment.flat[0] for moment in both] == [expected] * 2, f"step {step}"

        def plant(g, *both):
            for moment in both:
                moment.flat[0] = denormal

        tree.map(look, gradient, moments["m"], moments["v"])
        step_of(params, gradient, moments, step, *rest, **more)
        tree.map(plant, gradient, moments["m"], moments["v"])
        steps.append(step)

    monkeypatch.setattr(module, name, planting)
    small = partial(denoisers.init_mlp_denoiser, hidden=16), denoisers.mlp_denoiser
    monkeypatch.setitem(denoisers.DENOISERS, "mlp", small)
    flags = [*flags, "--batch-size", 2, "--train-images", 104, "--epochs", 2, "--workers", workers]
    call(module, *flags, "--out", tmp_path)
    assert steps == list(range(1, 105))


@pytest.mark.parametrize("additions", [[], ["v"], ["weights"], ["muon"], ["v", "black", "weights", "muon"]])
def test_the_additions_decide_on_loss_and_optimiser(additions, record, call, tmp_path):
    losses = record(diffusion, "simple_loss")
    steps = {name: record(run_ddpm, name) for name in ("adam_step", "muon_step")}
    flags = ["--T", 5, "--arch", "mlp", "--batch-size", 16, "--train-images", 40, "--workers", 1, "--out", tmp_path]
    call(run_ddpm, *flags, "--epochs", 2, "--lr", 0.01, "--additions", *(additions or ["none"]))
    assert sum(len(args[2][0]) for args in losses) == 40 * 2  # of each step's shards, and of nothing else
    weights = [args[3] for args in losses]
    if "weights" in additions:
        expected = improved.step_weights(diffusion.make_schedule("linear", 5))
        assert all(np.array_equal(found, expected) for found in weights)
    else:
        assert weights == [None] * len(losses)
    taken = steps.pop("muon_step" if "muon" in additions else "adam_step")
    assert [args[3:] for args in taken] == [(step, cosine_decay(step, 6, 0.01)) for step in range(1, 7)]
    assert list(steps.values()) == [[]]


def test_an_image_that_cannot_become_noise_is_warned_of(call, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(diffusion.SCHEDULES, "linear", lambda T: np.full(T, 0.01))
    call(run_ddpm, "--T", 5, "--epochs", 1, "--train-images", 16, "--arch", "mlp", "--out", tmp_path)
    assert "warning" in capsys.readouterr().out


@pytest.mark.parametrize(("module", "T"), [(run_ddpm, 1), (run_ddpm, 3)])
def test_very_few_steps_work_too(module, T, record, call, tmp_path):
    rows = record(plots, "row_of_times")
    call(module, "--T", T, "--epochs", 1, "--train-images", 16, "--arch", "mlp", "--out", tmp_path)
    times = rows[1][1]
    assert len(times) == min(6, T + 1) and times[0] == T and times[-1] == 0 and times == sorted(times, reverse=True)


def test_a_test_set_smaller_than_the_figures(small_data, tmp_path):
    for path in small_data.iterdir():
        content = path.read_bytes()
        if path.name.startswith("t10k"):  # 7 of the 40
            size = 784 if "images" in path.name else 1
            head = 16 if "images" in path.name else 8
            content = content[:4] + (7).to_bytes(4, "big") + content[8:head] + content[head : head + 7 * size]
        (tmp_path / path.name).write_bytes(content)
    flags = ["--data", tmp_path, "--epochs", 1, "--train-images", 16]
    for module, more in ((run_vae, []), (run_ddpm, ["--T", 30, "--arch", "mlp"])):
        main_of(module, *flags, *more, "--out", tmp_path / module.__name__)
    for figure in ("run_vae/reconstructions.png", "run_ddpm/trajectory.png"):
        assert (tmp_path / figure).exists()


# ------------------------------------------------------------------------------------------ each row of the ablation

ROWS = [list(improved.ADDITIONS)[:count] for count in range(len(improved.ADDITIONS) + 1)]


@pytest.mark.parametrize("additions", ROWS, ids=[" ".join(row) or "none" for row in ROWS])
def test_every_row_stops_resumes_and_is_measured_alike(additions, call, finish, monkeypatch, capsys, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = ["--T", 5, "--train-images", 48, "--batch-size", 16, "--epochs", 2, "--workers", 1]
    chosen = ["--additions", *(additions or ["none"])]
    call(run_ddpm, *flags, *chosen, "--out", whole)

    asked, calls = Run.stop_if_asked, itertools.count(1)

    def interrupt(run):
        if next(calls) == 4:  # between steps 4 and 5; an epoch has 3
            os.kill(os.getpid(), signal.SIGINT)
        asked(run)

    with monkeypatch.context() as patch, pytest.raises(cli.Stopped):
        patch.setattr(Run, "stop_if_asked", interrupt)
        call(run_ddpm, *flags, *chosen, "--out", stopped)
    _, half = checkpoint.load(stopped / "checkpoint.npz")
    assert half["step"] == 4 and len(half["log"]) == 1 and half["config"]["additions"] == additions

    others = ROWS[(ROWS.index(additions) + 1) % len(ROWS)]
    before, other_flags = (stopped / "checkpoint.npz").read_bytes(), ["--additions", *(others or ["none"])]
    capsys.readouterr()
    status, stderr = finish(lambda: call(run_ddpm, *flags, *other_flags, "--out", stopped, "--resume"))
    assert status == 2 and len(stderr.splitlines()) == 1 and (stopped / "checkpoint.npz").read_bytes() == before
    expected = f"made with additions {list(additions)}, this run has additions {list(others)};"
    assert expected in " ".join(stderr.split())

    call(run_ddpm, *flags, *chosen, "--out", stopped, "--resume")
    (a, state_a), (b, state_b) = (load(folder / "checkpoint.npz") for folder in (whole, stopped))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in state["log"]] for state in (state_a, state_b)]
    assert logs[0] == logs[1] and (whole / "samples.png").read_bytes() == (stopped / "samples.png").read_bytes()

    for folder in (whole, stopped):
        call(evaluate, folder, "--workers", 1, "--bound", 2)
    measured = [metrics(folder)["evaluation"] for folder in (whole, stopped)]
    assert measured[0] == measured[1] and measured[0].keys() == {"bound_estimate", "bound_exact_2"}
    assert 0 < measured[0]["bound_exact_2"]["bits_per_dimension"] < 100


def test_a_damaged_metrics_json_is_one_line_of_the_ablation(monkeypatch, tmp_path):
    ablation, seed = script("docs/ablation.py"), 3
    row = {"additions": [], "batch_size": 64, "T": 200, "epochs": 7, "lr": 1e-2, "seed": seed, "classes": False}
    run = SimpleNamespace(config=row, params={"w": np.zeros(2)})
    monkeypatch.setattr(ablation, "load_run", lambda folder: run)
    args = SimpleNamespace(runs=tmp_path, data=tmp_path, workers=1)
    (tmp_path / "ablation-0-3").mkdir()
    for damaged in ("{", "[]", '{"weights": "CRC-32 00000000"}'):
        (tmp_path / "ablation-0-3" / "metrics.json").write_text(damaged)
        with pytest.raises(cli.UsageError, match="expected the numbers of this run"):
            ablation.train_and_measure(args, 0, seed)
    run.config |= {"batch_size": 128}
    with pytest.raises(cli.UsageError, match="another batch_size"):
        ablation.train_and_measure(args, 0, seed)


def test_the_ablation_may_be_started_from_any_folder(monkeypatch, tmp_path):
    (tmp_path / "runs" / "vae").mkdir(parents=True)
    (tmp_path / "runs" / "vae" / "checkpoint.npz").touch()
    ablation, seen = script("docs/ablation.py"), []

    def train_and_measure(args, *row):
        seen.append(args.runs)
        raise cli.UsageError("seen")

    monkeypatch.setattr(ablation, "train_and_measure", train_and_measure)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cli.UsageError, match="seen"):
        ablation.main(["--runs", "runs"])  # what it starts works in the project's folder
    assert seen == [tmp_path.resolve() / "runs"]
