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


def test_the_figure_names_each_box_with_its_size_and_shape(params, boxes, monkeypatch, capsys):
    figures = {}
    monkeypatch.setattr(unet.plots, "save", lambda figure, path: figures.update({path: figure}))
    unet.main([])
    ((path, figure),) = figures.items()
    assert path == unet.FIGURE and capsys.readouterr().out == f"the figure is in {path}\n"
    (axes,) = figure.axes
    images = {name: box for name, box in boxes.items() if len(box.shape) == 4}
    of_t = tree.size(params) - sum(box.size for box in images.values())
    assert f" {tree.size(params):,} parameters ({of_t / 1000:.0f}k for t, not drawn)" in axes.get_title()
    kinds = dict(zip(tick_free_labels(axes), axes.get_legend().get_patches(), strict=False))
    colours = {label: patch.get_facecolor() for label, patch in kinds.items()}
    places = {}
    for column, (text, bar, (name, box)) in enumerate(zip(axes.texts, axes.patches, images.items(), strict=False)):
        first, shape = text.get_text().split("\n")
        label = "x_t, black, group mean" if name == "x" else name.split()[0]
        size = f", {box.size / 1000:.0f}k" if box.size >= 1000 else f", {box.size}" if box.size else ""
        assert (first, shape) == (label + size, " x ".join(map(str, box.shape[1:])))
        row = [7, 14, 28].index(box.shape[1])
        assert text.get_position() == (column, row) and bar.get_y() + bar.get_height() / 2 == pytest.approx(row)
        kind = "takes t" if "time/1" in box.inputs else "layer" if box.size else "rearranges"
        (colour,) = (colour for label, colour in colours.items() if label.startswith(kind))
        assert bar.get_facecolor() == colour and bar.get_x() + bar.get_width() / 2 == pytest.approx(column)
        places[name] = column
    skips = {tuple(int(x) for x in line.get_xdata()[[0, -1]]) for line in axes.lines if len(line.get_xdata())}
    assert skips == {
        (places[start], places[name])
        for name, box in images.items()
        for start in box.inputs & images.keys()
        if places[start] < places[name] - 1
    }


def tick_free_labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts() if text.get_text() != "skip connection"]
