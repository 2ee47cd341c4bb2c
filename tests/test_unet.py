"""docs/unet.py: the drawing has what the network does."""

from scratchgen import denoisers, tree
from scratchgen.trained import load_trained

import numpy as np
import pytest
from conftest import script

unet = script("docs/unet.py")


@pytest.fixture(scope="module")
def params():
    return load_trained("ddpm").params


@pytest.fixture(scope="module")
def boxes(params):
    return unet.boxes(unet.tape(params, np.zeros((1, 28, 28, 3), np.float32)))


def test_every_parameter_is_in_one_box(params, boxes):
    assert sum(box.size for box in boxes.values()) == tree.size(params)
    assert boxes["conv_in"].size == tree.size(params["conv_in"])
    assert boxes["global_middle/1/0"].size == tree.size(params["global_middle"][1][0])


@pytest.mark.parametrize("function", ["res_block", "global_block", "conv", "norm_silu"])
def test_a_box_hands_on_what_the_layer_returns(function, params, boxes, monkeypatch):
    """The network runs again, with this function of layers.py watched, and in the same order."""
    original, seen = getattr(denoisers, function), []
    names = {"res_block": ("_blocks",), "global_block": ("global",), "conv": ("conv",), "norm_silu": ("norm",)}[
        function
    ]

    def watched(*args):
        seen.append(original(*args).shape)
        return original(*args)

    monkeypatch.setattr(denoisers, function, watched)
    denoisers.unet(params, np.zeros((1, 28, 28, 3), np.float32), np.array([7]))
    assert seen == [box.shape for name, box in boxes.items() if any(part in name for part in names)]


def test_what_comes_from_where(boxes):
    names = [name for name, box in boxes.items() if len(box.shape) == 4]
    skips = {
        (start.split()[0], name.split()[0])
        for place, name in enumerate(names)
        for start in boxes[name].inputs & set(names)
        if start != names[place - 1]
    }
    assert skips == {("global_down/0", "concatenate"), ("space_to_depth", "concatenate")}
    assert boxes[names[0]].shape == (1, 28, 28, 3) and boxes[names[-1]].shape == (1, 28, 28, 1)
    with_time = {name for name, box in boxes.items() if "time/1" in box.inputs}
    assert with_time == {name for name in boxes if "_blocks" in name or name.startswith("global")}


def test_a_network_without_global_blocks_is_drawn_without_them(rng):
    params = denoisers.init_unet(rng, inputs=1)
    found = unet.boxes(unet.tape(params, np.zeros((1, 28, 28, 1), np.float32)))
    assert not any("global" in name for name in found)
    assert sum(box.size for box in found.values()) == tree.size(params)


def test_the_program_writes_the_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(unet, "FIGURE", tmp_path / "unet.png")
    unet.main([])
    assert (tmp_path / "unet.png").read_bytes().startswith(b"\x89PNG")
    assert "unet.png" in capsys.readouterr().out
