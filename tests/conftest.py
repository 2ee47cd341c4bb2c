"""Shared by all tests. scratchgen is imported before NumPy, as in the run scripts."""

import importlib.util
import json
import re
import shutil
import signal
import struct
import warnings
import zipfile
from pathlib import Path

import run_ddpm
import run_vae
from scratchgen import denoisers, diffusion, improved, tree, vae
from scratchgen.data import load_fashion_mnist
from scratchgen.layers import init_mlp
from scratchgen.machinery import blas, checkpoint, cli, parallel

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("thorough", max_examples=20_000, deadline=None)  # pytest --hypothesis-profile=thorough

ROOT = Path(__file__).parent.parent
T = 6  # of the diffusion model in ``runs``


def script(path):
    """A script that is no part of the package, such as docs/ablation.py, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(path):
    """The arrays of a checkpoint, by name, and its state, unchecked."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(str(arrays.pop("state")))


def tamper(path, arrays, state, keep_checksum):
    """Write other arrays, and another state or text, into a checkpoint, which has the checksum of before or none."""
    with zipfile.ZipFile(path) as archive:
        checksum = archive.comment
    np.savez(path, state=np.array(state if isinstance(state, str) else json.dumps(state)), **arrays)
    if keep_checksum:
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = checksum


def tiles(axes, low, high, line=1, columns=None):
    """The images of a panel, (N, 28, 28): row by row, from ``low``, which is black, to ``high``, which is white."""
    (image,) = axes.images
    assert image.get_clim() == (low, high) and image.cmap.name == "gray" and image.origin == "upper"
    framed = np.pad(np.asarray(image.get_array()), (0, line))
    edge = 28 + line
    rows = framed.reshape(len(framed) // edge, edge, -1, edge).transpose(0, 2, 1, 3)[:, :, :28, :28]
    assert columns in (None, rows.shape[1])
    return rows.reshape(-1, 28, 28)


def lines(axes):
    """The x and y of each line of a panel, by its label."""
    return {line.get_label(): tuple(np.asarray(each).tolist() for each in line.get_data()) for line in axes.lines}


def tick_labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def pytest_configure(config):
    """`-k question_1` means question 1 alone, and not 10 to 13, too."""
    config.option.keyword = re.sub(r"(question_\d+)\b", r"\1_", config.option.keyword)


@pytest.fixture(scope="session", autouse=True)
def signals_arrive():
    """Started by nohup, or by a script in the background, pytest and all that it starts would ignore some of them."""
    for number in parallel.STOP_SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def problem(rng):
    """The parameters of a small MLP, and a batch (x, y) of 13 images."""
    params = init_mlp(rng, [5, 7, 3])
    batch = rng.standard_normal((13, 5), dtype=np.float32), rng.standard_normal((13, 3), dtype=np.float32)
    return params, batch


@pytest.fixture(params=[True, False], ids=["tiles", "whole"])
def both_kinds(request, monkeypatch):
    """Matrix products as on a processor with AVX-512, and as on one without."""
    monkeypatch.setattr(blas, "SMALL_KERNELS", request.param)
    blas.tile.cache_clear()
    yield
    blas.tile.cache_clear()


@pytest.fixture(params=diffusion.SCHEDULES)
def schedule(request):
    return diffusion.make_schedule(request.param, 200)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    return write_small_data(tmp_path_factory.mktemp("data"))


def write_small_data(folder):
    """The first images of FashionMNIST as idx files: 200 to train on, 40 to test with."""
    arrays = load_fashion_mnist(ROOT / "data")
    folder.mkdir(exist_ok=True)
    for part, name, count in (("train", "train", 200), ("test", "t10k", 40)):
        images, labels = arrays[f"{part}_images"][:count, ..., 0], arrays[f"{part}_labels"][:count]
        header = bytes([0, 0, 8, 3]) + struct.pack(">III", *images.shape)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1]) + struct.pack(">I", count) + labels.tobytes()
        )
    return folder


@pytest.fixture
def x_test(small_data):
    with pytest.warns(UserWarning, match="not the published"):
        return load_fashion_mnist(small_data)["test_images"]


def main_of(module, *flags):
    """What a program's main function returns with these flags, on data that are not all of FashionMNIST."""
    with pytest.warns(UserWarning, match="not the published"):
        return module.main([str(flag) for flag in flags])


@pytest.fixture(scope="session")
def runs(small_data, tmp_path_factory):
    """A VAE and a diffusion model, hardly trained, in folders "vae" and "ddpm"."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--data", small_data, "--epochs", 1, "--train-images", 32, "--workers", 1]
    main_of(run_vae, *flags, "--latent-dim", 4, "--out", folder / "vae")
    main_of(run_ddpm, *flags, "--T", T, "--arch", "mlp", "--batch-size", 8, "--out", folder / "ddpm")
    return folder


@pytest.fixture
def folder(runs, tmp_path):
    """A copy of ``runs``, to do with as one likes."""
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture(scope="session")
def narrow_runs(small_data, tmp_path_factory):
    """Folders "vae", "ddpm", "classes" and "paper", without additions, as runs leave them. But the networks are narrow,
    and were never trained: what can be made of a run is tested with them in a tenth of the time."""
    with pytest.warns(UserWarning, match="not the published"):
        data = load_fashion_mnist(small_data)
    rng = np.random.default_rng(1)

    def spread(params):  # so that no output is 0
        return tree.map(lambda p: p + 0.05 * rng.standard_normal(p.shape, dtype=np.float32), params)

    def save(name, config, arrays):
        config = {"seed": 0, "batch_size": 8, "epochs": 1, "lr": 0.01} | config
        for part, first in (("train", 32), ("test", 40)):
            labels = data[f"{part}_labels"][:first] if config.get("classes") else None
            config[f"{part}_images"] = checkpoint.fingerprint([data[f"{part}_images"][:first], labels])
        (folder / name).mkdir()
        state = {"config": config, "step": 4, "seconds": 2.0, "log": [{"epoch": 1, "step": 4, "seconds": 2.0}]}
        checkpoint.save(folder / name / "checkpoint.npz", arrays, state)

    folder = tmp_path_factory.mktemp("narrow")
    params = spread(vae.init_mlp_vae(rng, 4, hidden=(16, 16)))
    params["mu"]["w"][:, 1] = 0  # one latent dimension is idle, though its KL is not 0
    params["mu"]["b"][1] = 1
    save("vae", {"model": "vae", "arch": "mlp", "latent_dim": 4, "beta": 1.0}, {"params": params})
    mlp, unet = denoisers.init_mlp_denoiser, denoisers.init_unet
    for name, arch, additions, params in (
        ("paper", "mlp", [], mlp(rng, hidden=24)),
        ("ddpm", "mlp", ["v", "black", "guide", "groups"], mlp(rng, inputs=3, hidden=24)),
        ("classes", "unet", ["v", "black", "guide", "groups"], unet(rng, inputs=3, classes=10, channels=(8, 16))),
    ):
        arrays = {weights: spread(params) for weights in ("params", "ema", "early")[: 3 if additions else 2]}
        if additions:
            labels = data["train_labels"] if name == "classes" else None
            arrays["groups"] = improved.find_groups(data["train_images"], labels, 20, rng)
        config = {"model": "ddpm", "arch": arch, "T": T, "schedule": "linear", "additions": additions}
        save(name, config | {"classes": name == "classes"}, arrays)
    return folder


@pytest.fixture
def narrow(narrow_runs, tmp_path):
    """A copy of ``narrow_runs``, to do with as one likes."""
    return Path(shutil.copytree(narrow_runs, tmp_path / "narrow"))


@pytest.fixture
def finish(capsys, monkeypatch):
    """Run a main function as the scripts do; return its exit status and stderr."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards

    def run(main):
        with pytest.raises(SystemExit) as stop:
            cli.run(main)
        return stop.value.code, capsys.readouterr().err

    return run
