"""The protocol of published likelihoods: its pixels, the weights it keeps, its own measurement, and that it resumes."""

import contextlib
import io
import json
import os
import signal
from functools import partial
from types import SimpleNamespace

from scratchgen import tree, vae
from scratchgen.data import load_idx
from scratchgen.evaluate import metrics
from scratchgen.machinery import checkpoint, cli
from scratchgen.machinery import run as machinery
from scratchgen.machinery.parallel import Ranks
from scratchgen.optim import cosine_decay
from scratchgen.trained import VAE

import numpy as np
import pytest
from conftest import load, main_of, script

protocol = script("docs/published_protocol.py")
protocol.SHARD = 8  # so small that a minibatch of 16 has work for two ranks
SMALL = ["--arch", "mlp", "--latent-dim", 4, "--hold-out", 20, "--iwae", 50]  # 180 images are left to train on


@pytest.fixture
def call(small_data):
    return lambda *flags: main_of(protocol, "--data", small_data, *flags)


# -------------------------------------------------------------------------------------------------------------- pixels


def test_binarised_pixels_are_on_as_often_as_their_grey_value_says(rng):
    grey = np.array([0, 64, 200, 255], np.uint8)
    images = np.tile(grey, (50_000, 1))
    pixels = protocol.binarise(images, rng)
    assert pixels.dtype == np.float32 and set(np.unique(pixels)) == {0, 1}
    np.testing.assert_allclose(pixels.mean(axis=0), grey / 255, atol=0.01)
    assert pixels[:, 0].max() == 0 and pixels[:, 3].min() == 1  # black never, white always
    assert np.any(pixels != protocol.binarise(images, rng))
    np.testing.assert_array_equal(protocol.binarised_test(images), protocol.binarised_test(images))


# --------------------------------------------------------------------------------------------------------------- a run


def recording(patch):
    """What each step from now on is made of: pixels, noise, beta, learning rate, and the weights around the step."""
    steps = []
    batches = []
    negative_elbo = vae.negative_elbo
    muon_step = protocol.muon_step

    def loss(encode, decode, batch, beta):
        batches.append((*batch, float(beta)))
        return negative_elbo(encode, decode, batch, beta)

    def step_and_record(params, gradient, moments, step, lr):
        x, eps, betas = zip(*batches, strict=True)
        batches.clear()
        found = tree.map(np.copy, params)
        muon_step(params, gradient, moments, step, lr)
        of_step = {"step": step, "lr": lr, "x": np.concatenate(x), "eps": np.concatenate(eps), "betas": set(betas)}
        steps.append(SimpleNamespace(**of_step, found=found, left=tree.map(np.copy, params)))

    patch.setattr(vae, "negative_elbo", loss)
    patch.setattr(protocol, "muon_step", step_and_record)
    return steps


FLAGS = [*SMALL, "--batch-size", 16, "--epochs", 4, "--lr", 0.05, "--warm-up", 2, "--weight-decay", 0.2, "--seed", 3]


@pytest.fixture(scope="module")
def whole(small_data, tmp_path_factory):
    """(folder, what it printed, its steps) of a run of four epochs that was left alone, with one worker."""
    folder = tmp_path_factory.mktemp("protocol")
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        steps = recording(patch)
        main_of(protocol, *FLAGS, "--data", small_data, "--workers", 1, "--out", folder)
    return folder, out.getvalue(), steps


def best_row_and_weights(folder):
    arrays, state = load(folder / "checkpoint.npz")
    held_out = [row["held_out_elbo"] for row in state["log"]]
    return state["log"][int(np.argmax(held_out))], tree.nested(arrays)["best"], arrays, state


def test_it_measures_the_weights_of_the_best_epoch_on_binarised_pixels(whole, small_data, x_test):
    folder, out, _ = whole
    best, params, _, state = best_row_and_weights(folder)
    numbers = json.loads((folder / "metrics.json").read_text())
    assert numbers["elbo"] == best["test_elbo"] == numbers["reconstruction"] - numbers["kl"]
    encode = partial(vae.mlp_encode, params)
    decode = partial(vae.mlp_decode, params)
    images = load_idx(small_data / "train-images-idx3-ubyte")[..., None]
    held_out = protocol.binarise(images[180:], machinery.rng_for(3, protocol.HELD_OUT))
    x = protocol.binarised_test(x_test)
    for pixels, elbo in ((x, best["test_elbo"]), (held_out, best["held_out_elbo"])):
        eps = machinery.rng_for(3, machinery.TEST).standard_normal((len(pixels), 4), dtype=np.float32)
        reconstruction, kl = vae.elbo_terms(encode, decode, (pixels, eps))
        assert (reconstruction - kl).mean() == pytest.approx(elbo, rel=1e-5)
    assert numbers["active_units"] == metrics.active_units(encode(x)[0]).sum()
    assert best["test_elbo"] < numbers["iwae_50"] < 0
    with Ranks(2) as ranks:
        again = VAE(state["config"], {"params": params}).importance_weighted_bound(x, 50, 3, ranks)
    assert numbers["iwae_50"] == pytest.approx(again, rel=1e-6)
    assert (folder / "loss.png").stat().st_size > 1000

    lines = [line for line in out.splitlines() if not line.startswith("wrote")]
    assert lines[1] == "180 training images, 20 held out"
    for number, row in enumerate(state["log"], start=1):
        parts = f"train {row['train_elbo']:.2f}, held-out {row['held_out_elbo']:.2f}, test {row['test_elbo']:.2f} nats"
        assert lines[1 + number].startswith(f"epoch {number}/4  ELBO: {parts}  ")
        assert row["train_elbo"] == pytest.approx(row["train_reconstruction"] - row["train_kl"])
        assert row["test_elbo"] == row["test_reconstruction"] - row["test_kl"]
    at_best = f"after epoch {best['epoch']}; there, test ELBO {numbers['elbo']:.2f} = "
    assert lines[6:] == [
        f"best held-out ELBO: {best['held_out_elbo']:.2f} nats, {at_best}"
        f"{numbers['reconstruction']:.2f} - {numbers['kl']:.2f} nats",
        f"{numbers['active_units']} of 4 latent dimensions active",
        f"log p(x) is at least {numbers['iwae_50']:.2f} nats: the importance-weighted bound, 50 samples per image",
    ]
    assert state["log"][-1]["held_out_elbo"] > state["log"][0]["held_out_elbo"]  # it has learned something


def test_each_step_has_pixels_and_noise_of_its_own(whole, small_data):
    """The last images are held out. The others are drawn anew each epoch: 0 stays 0, and 255 stays 1."""
    folder, _, steps = whole
    images = load_idx(small_data / "train-images-idx3-ubyte")[..., None]
    _, state = load(folder / "checkpoint.npz")
    assert state["config"]["train_images"] == checkpoint.fingerprint(images[:180])
    assert [row["step"] for row in state["log"]] == [12, 24, 36, 48]  # 180 images are 11 times 16 and 4
    x = np.concatenate([step.x for step in steps])
    assert x.shape == (4 * 180, 28, 28, 1) and set(np.unique(x)) == {0, 1}
    for of_epoch in x.reshape(4, 180, -1):  # of each image there is one: its black and its white pixels say so
        distances = ((of_epoch[:, None] - images[None, :180].reshape(1, 180, -1) / 255) ** 2).sum(axis=2)
        assert sorted(distances.argmin(axis=1)) == list(range(180))
    for all_of_them in (x, np.concatenate([step.eps for step in steps])):
        assert len(np.unique(all_of_them.reshape(4 * 180, -1), axis=0)) == 4 * 180


def test_each_step_has_its_beta_learning_rate_and_weight_decay(whole, call, tmp_path, monkeypatch):
    """Matrices, and no biases, shrink by 1 - lr W before each step. All else is as the step before has left it."""
    steps = whole[2]
    assert [(step.step, step.lr) for step in steps] == [(n, cosine_decay(n, 48, 0.05)) for n in range(1, 49)]
    np.testing.assert_allclose([list(step.betas) for step in steps], [[min(1, n / 24)] for n in range(1, 49)])
    unlike = recording(monkeypatch)
    flags = ["--batch-size", 32, "--train-images", 84, "--warm-up", 0, "--weight-decay", 0, "--iwae", 1]
    call(*SMALL, *flags, "--epochs", 1, "--workers", 1, "--out", tmp_path, "--seed", 3)
    assert [step.betas for step in unlike] == [{1}, {1}]
    start = vae.init_mlp_vae(machinery.rng_for(3, machinery.INIT), 4)
    for taken, weight_decay in ((steps, 0.2), (unlike, 0)):
        for step, left in zip(taken, [start, *(step.left for step in taken)], strict=False):
            for name, before, found in zip(tree.names(left), tree.leaves(left), tree.leaves(step.found), strict=True):
                decay = 1 - step.lr * weight_decay if name.endswith("w") else 1
                np.testing.assert_allclose(found, decay * before, rtol=1e-6, err_msg=name)
        assert np.any(taken[-1].left["mu"]["b"] != start["mu"]["b"])  # biases are stepped all the same


def test_the_best_weights_are_kept_and_measured_when_later_epochs_are_worse(call, x_test, monkeypatch, tmp_path):
    """ELBOs are made up here: by those of the twenty images held out, the second of four epochs is the best."""
    made_up = {20: iter([-300.0, -200.0, -250.0, -220.0]), 40: iter([-250.0, -240.0, -230.0, -235.0])}
    steps = recording(monkeypatch)
    codes = []
    monkeypatch.setattr(protocol, "active_units", lambda mu: codes.append(mu) or np.ones(len(mu)))
    monkeypatch.setattr(
        protocol, "in_parallel", lambda *args: lambda x, eps: np.tile([next(made_up[len(x)]), 0], (len(x), 1))
    )
    call(*SMALL, "--train-images", 60, "--epochs", 4, "--lr", 0.05, "--workers", 1, "--out", tmp_path)
    best, params, arrays, state = best_row_and_weights(tmp_path)
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert best["epoch"] == 2 and numbers["elbo"] == -240 and len(steps) == 4
    np.testing.assert_array_equal(params["mu"]["w"], steps[1].left["mu"]["w"])
    np.testing.assert_array_equal(arrays["params/mu/w"], steps[3].left["mu"]["w"])  # training went on with the last
    model, x = VAE(state["config"], {"params": params}), protocol.binarised_test(x_test)
    assert numbers["iwae_50"] == pytest.approx(model.importance_weighted_bound(x, 50, 0, Ranks(1)), rel=1e-6)
    np.testing.assert_array_equal(codes, [model.encode(x)[0]])
    assert numbers["active_units"] == 40  # for here it counts the images: those of the test set


def test_stopped_and_resumed_with_other_workers_it_gives_the_same_bits(whole, call, monkeypatch, tmp_path):
    """Stopped twice: in the middle of an epoch, and in the last step of one."""
    step_of = protocol.muon_step
    for workers, stop_at, more in ((2, 18, []), (3, 24, ["--resume"]), (1, None, ["--resume"])):

        def step_and_stop(*args, stop_at=stop_at):
            step_of(*args)
            if args[3] == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(protocol, "muon_step", step_and_stop)
        with pytest.raises(cli.Stopped) if stop_at else contextlib.nullcontext():
            call(*FLAGS, "--workers", workers, "--out", tmp_path, *more)
        assert load(tmp_path / "checkpoint.npz")[1]["step"] == (stop_at or 48)
    (_, _, whole_arrays, whole_state), (_, _, arrays, state) = map(best_row_and_weights, (whole[0], tmp_path))
    assert arrays.keys() == whole_arrays.keys() and "best/mu/w" in arrays
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], whole_arrays[name], err_msg=name)
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in s["log"]] for s in (whole_state, state)]
    assert logs[0] == logs[1]
    numbers = [json.loads((path / "metrics.json").read_text()) for path in (whole[0], tmp_path)]
    assert all(numbers[0][name] == numbers[1][name] for name in ("elbo", "kl", "active_units", "iwae_50", "weights"))


def test_it_is_resumed_only_with_the_settings_it_was_made_with(whole, call):
    other = {"arch": "conv", "latent_dim": 5, "warm_up": 3, "weight_decay": 0.1, "hold_out": 30}
    for name, value in other.items():
        with pytest.raises(checkpoint.CheckpointError, match=f"made with {name} .*, this run has {name} {value};"):
            call(*FLAGS, "--out", whole[0], "--resume", f"--{name.replace('_', '-')}", value)


# --------------------------------------------------------------------------------------------------------------- flags


def test_the_defaults_are_those_of_the_table_in_quality_md():
    args = vars(protocol.parse_arguments([]))
    expected = {"arch": "gated", "epochs": 700, "batch_size": 128, "lr": 2e-3, "latent_dim": 40, "warm_up": 100}
    expected |= {"weight_decay": 0.02, "hold_out": 10_000, "iwae": 5000, "train_images": None, "seed": 0}
    assert args.items() >= expected.items()


RANGES = "--weight-decay -1, --weight-decay 600, --hold-out 0, --iwae 0, --warm-up -1, --latent-dim 1, --beta 4"


@pytest.mark.parametrize("flags", RANGES.split(", "))
def test_a_flag_out_of_range_is_one_line(flags, small_data, tmp_path, capsys):
    """600 times the learning rate is above 1. There is no beta: the bound is the point here."""
    with pytest.raises(SystemExit) as stop:
        protocol.main(["--data", str(small_data), "--out", str(tmp_path / "out"), *flags.split()])
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and len(stderr.splitlines()) == 1 and flags.split()[0] in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--hold-out", 200], ["--hold-out", 50, "--train-images", 50]])
def test_holding_out_everything_is_refused(flags, call, tmp_path):
    with pytest.raises(cli.UsageError, match=f"--hold-out {flags[1]} leaves none of"):
        call("--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
