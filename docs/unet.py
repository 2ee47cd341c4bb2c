"""Draw the U-Net layer by layer, with the shapes: docs/figures/unet.png.

    python docs/unet.py

The drawing is made from a tape: the network of the package's trained weights
runs once, on one image, and the tape records each operation, its parameters and
its inputs. Only the names of x's channels are written by hand.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from scratchgen import gradients, plots  # before NumPy: sets its threads
from scratchgen.denoisers import unet
from scratchgen.machinery import cli
from scratchgen.trained import load_trained

import numpy as np
from autograd.tracer import toposort

FIGURE = Path(__file__).resolve().parent / "figures" / "unet.png"
REARRANGE = {"space_to_depth", "depth_to_space", "concatenate_args"}  # a box each, although without parameters


def main(argv=None):
    cli.OneLineParser("docs/unet.py", __doc__).parse_args(argv)
    plots.save(drawing(load_trained("ddpm").params), FIGURE)
    print(f"the figure is in {FIGURE}")


@dataclass
class Box:
    """A layer or a block of layers: its name among the parameters, the shape of its output, the number of its
    parameters, and the names of the boxes from which it takes its inputs."""

    name: str
    shape: tuple = ()
    size: int = 0
    inputs: set = field(default_factory=set)


def tape(params, x):
    """The nodes of one run of the U-Net on x, (1, H, W, C), at t = 1, each after its parents."""
    nodes = []

    def record(arrays):
        y = unet(arrays["network"], arrays["x"], np.array([1]))
        nodes.extend(toposort(y._node))  # each before its parents
        return y.sum()

    gradients.value_and_grad(record)({"network": params, "x": x})
    return nodes[::-1]


def boxes(nodes):
    """Name -> Box, in the order of the network, from the nodes of a `tape`.

    An operation with parameters belongs to the box of these parameters. One without belongs to the box of its latest
    parent, or is a box of its own if it rearranges an image.
    """
    found = {}
    box_of = {}  # node -> Box
    order = {node: number for number, node in enumerate(nodes)}
    for node in nodes:
        if not node.parents:
            if node.name == "parameter x":
                box_of[node] = found["x"] = Box("x", node.shape)
            continue
        inputs = [parent for parent in node.parents if parent in box_of]
        parameters = [parent for parent in node.parents if parent not in box_of]
        if parameters:
            name = block(parameters[0].name.removeprefix("parameter network/"))
        elif node.name in REARRANGE:
            name = f"{node.name.removesuffix('_args')} {len(found)}"  # a number, as there are several
        else:
            name = box_of[max(inputs, key=order.get)].name
        box = box_of[node] = found.setdefault(name, Box(name))
        box.shape = node.shape  # the last one is what it hands on
        box.size += sum(math.prod(parameter.shape) for parameter in parameters)
        box.inputs |= {box_of[parent].name for parent in inputs} - {name}
    return found


def block(path):
    """The part of a parameter's path that names its block: down_blocks/0/conv1/w -> down_blocks/0."""
    parts = path.split("/")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return "/".join(parts[: numbers[-1] + 1] if numbers else parts[:-1])


def drawing(params):
    """The boxes that hand on images, from left to right, a row for each height and width of an image."""
    channels = params["conv_in"]["w"].shape[2] // 4  # `unet` begins with `space_to_depth`
    found = boxes(tape(params, np.zeros((1, 28, 28, channels), np.float32)))
    images = {name: box for name, box in found.items() if len(box.shape) == 4}
    rows = sorted({box.shape[1] for box in images.values()})
    place = {name: (column, rows.index(box.shape[1])) for column, (name, box) in enumerate(images.items())}
    total = sum(box.size for box in found.values())

    figure = plots.new_figure(7.5, 4.8)
    axes = figure.add_subplot()
    of_t = total - sum(box.size for box in images.values())
    title = (
        f"the U-Net: layers, their {total:,} parameters ({in_thousands(of_t)} for t, not drawn), and outputs, H x W x C"
    )
    axes.set_title(title, fontsize="medium")
    axes.set(xlim=(-0.5, len(images) - 0.5), ylim=(-0.45, len(rows) - 0.55))
    axes.axis("off")
    skips = 0
    for name, box in images.items():
        column, row = place[name]
        sees_t = any(other.startswith("time") for other in box.inputs)
        axes.bar(column, 0.8, 0.86, row - 0.4, color="#ffc98f" if sees_t else "#a9cbe8" if box.size else "#e3e3e3")
        size = f", {in_thousands(box.size)}" if box.size else ""
        label = "x_t, black, group mean" if name == "x" else name.split()[0]
        text = f"{label}{size}\n{' x '.join(map(str, box.shape[1:]))}"
        axes.text(column, row, text, rotation=90, ha="center", va="center", fontsize=6.5)
        for other in sorted(box.inputs & images.keys()):
            start, _ = place[other]
            if start < column - 1:  # not from the box before
                above = row + 0.44 + 0.06 * skips
                axes.plot([start, start, column, column], [row + 0.4, above, above, row + 0.4], color="C3", linewidth=1)
                skips += 1
    for label, colour in (
        ("takes t as well (global: sees the whole image at once)", "#ffc98f"),
        ("layer", "#a9cbe8"),
        ("rearranges", "#e3e3e3"),
    ):
        axes.bar(0, 0, color=colour, label=label)
    axes.plot([], [], color="C3", label="skip connection")
    axes.legend(loc="upper center", fontsize="small", frameon=False)
    return figure


def in_thousands(size):
    return f"{size / 1000:.0f}k" if size >= 1000 else str(size)


if __name__ == "__main__":
    cli.run(main, "stopped: the figure that was there is still there")
