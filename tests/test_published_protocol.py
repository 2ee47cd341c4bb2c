"""The protocol of published likelihoods: its pixels, the weights it keeps, its own measurement, and that it resumes."""

import json
import os
import signal
from functools import partial

from scratchgen import tree, vae
from scratchgen.data import load_idx
from scratchgen.evaluate import __main__ as evaluate
from scratchgen.evaluate import metrics
from scratchgen.machinery import checkpoint, cli, parallel
from scratchgen.machinery import run as machinery
from scratchgen.machinery.parallel import Ranks
from scratchgen.optim import cosine_decay
from scratchgen.trained import VAE, load_run

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
    pixels = protocol.binarise(np.tile(grey, (50_000, 1)), rng)
    assert pixels.dtype == np.float32 and set(np.unique(pixels)) == {0, 1}
    np.testing.assert_allclose(pixels.mean(axis=0), grey / 255, atol=0.01)
    assert pixels[:, 0].max() == 0 and pixels[:, 3].min() == 1  # black never, white always


def test_the_binarised_test_set_is_always_the_same(rng):
    images = rng.integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    np.testing.assert_array_equal(protocol.binarised_test(images), protocol.binarised_test(images))
    assert np.any(protocol.binarise(images, rng) != protocol.binarise(images, rng))  # the training set is not


# --------------------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def whole(small_data, tmp_path_factory):
    """(flags, folder) of a run of four epochs that was left alone, with one worker."""
    folder = tmp_path_factory.mktemp("protocol")
    flags = [*SMALL, "--data", small_data, "--batch-size", 16, "--epochs", 4, "--lr", 0.05, "--warm-up", 1]
    main_of(protocol, *flags, "--workers", 1, "--out", folder)
    return flags, folder


def best_row_and_weights(folder):
    arrays, state = load(folder / "checkpoint.npz")
    held_out = [row["held_out_elbo"] for row in state["log"]]
    return state["log"][int(np.argmax(held_out))], tree.nested(arrays)["best"], arrays, state


def test_it_measures_the_weights_of_the_best_epoch_on_binarised_pixels(whole, x_test):
    _, folder = whole
    best, params, _, state = best_row_and_weights(folder)
    numbers = json.loads((folder / "metrics.json").read_text())
    assert numbers["elbo"] == best["test_elbo"] == numbers["reconstruction"] - numbers["kl"]
    x = protocol.binarised_test(x_test)
    assert set(np.unique(x)) == {0, 1}
    eps = machinery.rng_for(0, machinery.TEST).standard_normal((len(x), 4), dtype=np.float32)
    encode = partial(vae.mlp_encode, params)
    decode = partial(vae.mlp_decode, params)
    reconstruction, kl = vae.elbo_terms(encode, decode, (x, eps))
    assert (reconstruction - kl).mean() == pytest.approx(best["test_elbo"], rel=1e-5)
    assert numbers["active_units"] == metrics.active_units(encode(x)[0]).sum()
    assert best["test_elbo"] < numbers["iwae_50"] < 0
    with Ranks(2) as ranks:
        again = VAE(state["config"], {"params": params}).importance_weighted_bound(x, 50, 0, ranks)
    assert numbers["iwae_50"] == pytest.approx(again, rel=1e-6)
    assert (folder / "loss.png").exists()


def test_the_best_weights_are_kept_when_later_epochs_are_worse(call, monkeypatch, tmp_path):
    """Held-out ELBOs are made up here: the second of four epochs is the best."""
    weights = []
    made_up = iter([-300.0, -200.0, -250.0, -220.0])
    end_epoch = machinery.Run.end_epoch

    def fake_parallel(f, shard, ranks):
        def evaluate(x, eps):
            if len(x) == 20:  # the held-out images
                weights.append(None)
                return np.tile(np.float32([next(made_up), 0]), (20, 1))
            return np.tile(np.float32([-240, 10]), (len(x), 1))

        return evaluate

    def keep(run, *args):
        weights[-1] = run.arrays["params"]["mu"]["w"].copy()
        end_epoch(run, *args)

    monkeypatch.setattr(protocol, "in_parallel", fake_parallel)
    monkeypatch.setattr(machinery.Run, "end_epoch", keep)
    call(*SMALL, "--epochs", 4, "--lr", 0.05, "--workers", 1, "--out", tmp_path)
    best, params, arrays, _ = best_row_and_weights(tmp_path)
    assert best["epoch"] == 2
    np.testing.assert_array_equal(params["mu"]["w"], weights[1])
    assert np.any(weights[1] != weights[3])
    np.testing.assert_array_equal(arrays["params/mu/w"], weights[3])  # training itself went on with the last


def test_what_is_held_out_are_the_last_images_and_nothing_is_trained_on_them(whole, small_data):
    _, _, _, state = best_row_and_weights(whole[1])
    images = load_idx(small_data / "train-images-idx3-ubyte")[..., None]
    assert state["config"]["train_images"] == checkpoint.fingerprint(images[:180])
    assert [row["step"] for row in state["log"]] == [12, 24, 36, 48]  # 180 images are 11 times 16 and 4
    for row in state["log"]:
        assert row["train_elbo"] == pytest.approx(row["train_reconstruction"] - row["train_kl"])
        assert row["test_elbo"] == row["test_reconstruction"] - row["test_kl"]


def test_training_lowers_the_loss(whole):
    _, _, _, state = best_row_and_weights(whole[1])
    assert state["log"][-1]["held_out_elbo"] > state["log"][0]["held_out_elbo"]


def test_evaluate_does_not_take_it_for_a_run_on_grey_pixels(whole, small_data):
    with pytest.raises(checkpoint.CheckpointError, match="expected a run of run_vae.py or run_ddpm.py, found another"):
        load_run(whole[1])
    with pytest.raises(checkpoint.CheckpointError, match="expected a run of run_vae.py or run_ddpm.py, found another"):
        evaluate.main([str(whole[1]), "--data", str(small_data)])


@pytest.mark.parametrize("stop_at", [18, 24])  # in the middle of an epoch, and in the last step of one
def test_stopped_and_resumed_with_other_workers_it_gives_the_same_bits(whole, stop_at, monkeypatch, tmp_path):
    flags, folder = whole
    step_of = protocol.muon_step

    def step_and_stop(*args):
        step_of(*args)
        if args[3] == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(protocol, "muon_step", step_and_stop)
    with pytest.raises(cli.Stopped):
        main_of(protocol, *flags, "--workers", 2, "--out", tmp_path)
    assert load(tmp_path / "checkpoint.npz")[1]["step"] == stop_at
    monkeypatch.setattr(protocol, "muon_step", step_of)
    main_of(protocol, *flags, "--workers", 3, "--out", tmp_path, "--resume")
    (_, _, whole_arrays, whole_state), (_, _, arrays, state) = map(best_row_and_weights, (folder, tmp_path))
    assert arrays.keys() == whole_arrays.keys() and "best/mu/w" in arrays
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], whole_arrays[name], err_msg=name)
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in s["log"]] for s in (whole_state, state)]
    assert logs[0] == logs[1]
    numbers = [json.loads((path / "metrics.json").read_text()) for path in (folder, tmp_path)]
    assert all(numbers[0][name] == numbers[1][name] for name in ("elbo", "kl", "active_units", "iwae_50", "weights"))


# --------------------------------------------------------------------------------------------------------------- flags


def test_warm_up_reaches_the_loss(call, monkeypatch, tmp_path):
    betas = []
    negative_elbo = vae.negative_elbo

    def recording(encode, decode, batch, beta):
        betas.append(float(beta))
        return negative_elbo(encode, decode, batch, beta)

    monkeypatch.setattr(vae, "negative_elbo", recording)
    monkeypatch.setattr(parallel, "shard_size", lambda batch_size, cores: batch_size)  # one call a step
    flags = [*SMALL, "--batch-size", 16, "--train-images", 84, "--workers", 1, "--out", tmp_path]  # 64 are left
    call(*flags, "--epochs", 3, "--warm-up", 2)
    assert betas == [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1, 1, 1, 1]
    betas.clear()
    call(*flags, "--epochs", 1, "--warm-up", 0)
    assert betas == [1] * 4


@pytest.mark.parametrize("weight_decay", [0.2, 0])
def test_weight_decay_shrinks_all_matrices_before_each_step_and_no_biases(weight_decay, call, monkeypatch, tmp_path):
    """Each step finds the weights as the one before has left them, but for the decay, by 1 - lr W."""
    taken = []
    found = []
    left = [vae.init_mlp_vae(machinery.rng_for(0, machinery.INIT), 4)]
    step_of = protocol.muon_step

    def step_and_record(params, gradient, moments, step, lr):
        taken.append((step, lr))
        found.append(tree.map(np.copy, params))
        step_of(params, gradient, moments, step, lr)
        left.append(tree.map(np.copy, params))

    monkeypatch.setattr(protocol, "muon_step", step_and_record)
    flags = [*SMALL, "--batch-size", 16, "--train-images", 70, "--epochs", 2, "--workers", 1, "--out", tmp_path]
    call(*flags, "--lr", 0.01, "--weight-decay", weight_decay)
    assert taken == [(step, cosine_decay(step, 8, 0.01)) for step in range(1, 9)]  # 50 are 16 + 16 + 16 + 2
    for (_, lr), before, after in zip(taken, left, found, strict=False):
        for name, one, other in zip(tree.names(before), tree.leaves(before), tree.leaves(after), strict=True):
            decay = 1 - lr * weight_decay if name.endswith("w") else 1
            np.testing.assert_allclose(other, decay * one, rtol=1e-6, err_msg=name)
    assert np.any(left[-1]["mu"]["b"] != left[0]["mu"]["b"])  # biases are stepped all the same


@pytest.mark.parametrize(
    "flags",
    [
        ("--weight-decay", "-1"),
        ("--weight-decay", "600"),  # times the learning rate above 1
        ("--hold-out", "0"),
        ("--iwae", "0"),
        ("--warm-up", "-1"),
        ("--latent-dim", "1"),
        ("--beta", "4"),  # the bound is the point here
    ],
)
def test_a_flag_out_of_range_is_one_line(flags, small_data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        protocol.main(["--data", str(small_data), "--out", str(tmp_path / "out"), *flags])
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and len(stderr.splitlines()) == 1 and flags[0] in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags", [["--hold-out", 200], ["--hold-out", 10_000], ["--hold-out", 50, "--train-images", 50]]
)
def test_holding_out_everything_is_refused(flags, call, tmp_path):
    with pytest.raises(cli.UsageError, match=f"--hold-out {flags[1]} leaves none of"):
        call("--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
