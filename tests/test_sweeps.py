"""docs/sweeps.py: the figures of what `evaluate` has measured with several steps, or with several w."""

from dataclasses import asdict

from scratchgen import plots
from scratchgen.data import UserError
from scratchgen.machinery import files
from scratchgen.samplers import SamplerConfig
from scratchgen.trained import load_run

import pytest
from conftest import script

sweeps = script("docs/sweeps.py")


def measured(distance, config=None):
    """What metrics.json says of samples, as `reports.measure_samples` puts it there."""
    numbers = {"distance": distance, "precision": distance / 100, "recall": distance / 200, "share": [0.1] * 10}
    return {str(config): numbers | asdict(config)} if config else numbers


@pytest.fixture
def add(narrow):
    path = narrow / "ddpm" / "metrics.json"
    params = load_run(narrow / "ddpm").params
    return lambda numbers, N=10, seed=0: files.add_evaluation(path, params, f"frechet_{N}", numbers, seed)


@pytest.fixture
def figures(narrow, monkeypatch, capsys):
    """Call the program; {name: figure} of what it wrote into the run's folder."""

    def call(*flags):
        saved = {}
        with monkeypatch.context() as patch:
            patch.setattr(plots, "save", lambda figure, path: saved.update({path: figure}))
            sweeps.main([str(narrow / "ddpm"), "--frechet", "10", *flags])
        assert all(path.parent == narrow / "ddpm" for path in saved)
        names = [path.name for path in saved]
        assert capsys.readouterr().out == f"wrote {' and '.join(names)} in {narrow / 'ddpm'}\n"
        return {path.name: figure for path, figure in saved.items()}

    return call


def drawn(axes):
    """The points of each curve that the legend names."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_label()[0] != "_"}


def test_what_was_measured_with_several_steps_and_with_several_w(add, figures, tmp_path):
    add({"training images": measured(1.0), "VAE": measured(50.0)})
    for steps, distance in ((200, 3.0), (10, 30.0), (20, 9.0)):  # in any order, and by several calls of `evaluate`
        add(measured(distance, SamplerConfig("ddpm", steps)))
    spread = {1: 0.2, 0: 0.1, 0.5: 0.3}  # of several draws
    for w, distance in ((1, 4.0), (0, 5.0), (0.5, 2.0)):
        of_w = measured(distance, SamplerConfig("sde-dpm++", 20, w))
        add({name: one | {"spread": spread[w]} for name, one in of_w.items()})
    found = figures()
    assert list(found) == ["steps.png", "guidance.png"]

    (axes,) = found["steps.png"].axes
    assert drawn(axes) == {"ddpm": [[10, 30], [20, 9], [200, 3]]}  # what had 20 steps alone is no curve
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "20", "200"]
    assert {text.get_text(): text.xy[1] for text in axes.texts} == {"training images": 1, "VAE": 50}
    levels = [line.get_ydata() for line in axes.lines if len(line.get_xydata()) == 2]
    assert [level[0] for level in levels] == [1, 50] and axes.get_yscale() == axes.get_xscale() == "log"
    assert axes.get_title() == "Fréchet distance of 10 samples"

    panels = found["guidance.png"].axes
    titles = [axes.get_title() for axes in panels]
    assert [title.split(":")[0] for title in titles] == ["Fréchet distance, 10 samples", "precision", "recall"]
    assert [axes.get_ylim()[0] for axes in panels] == [0, 0, 0]
    assert panels[1].get_ylim()[1] == panels[2].get_ylim()[1] == 1
    for axes, divisor in zip(panels, (1, 100, 200), strict=True):
        curve = [[0, 5 / divisor], [0.5, 2 / divisor], [1, 4 / divisor]]
        assert drawn(axes) == {"sde-dpm++, 20 steps, early": curve}
    (bars,) = panels[0].collections
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx([d - s, d + s]) for d, s in ((5, 0.1), (2, 0.3), (4, 0.2))]
    assert not panels[1].collections
    plots.save(found["steps.png"], tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 1000


def test_each_sampler_guide_and_w_has_a_curve(add, figures):
    every = {}
    for steps in (5, 10, 20):
        for sampler, w in (("ddim", 0), ("dpm++", 0), ("dpm++", 2), ("dpm++", 3)):
            for guide in ("early", "unlabelled") if w else ("early",):
                config = SamplerConfig(sampler, steps, w, guide)
                numbers = measured(steps + w + len(guide), config)
                every |= {name: one | {"agreement": w / 4} for name, one in numbers.items()}
    add(every)
    found = figures()
    curves = {"ddim": 5, "dpm++": 5}
    curves |= {f"dpm++, w = {w}, {guide}": w + len(guide) for w in (2, 3) for guide in ("early", "unlabelled")}
    assert drawn(found["steps.png"].axes[0]) == {
        name: [[steps, steps + more] for steps in (5, 10, 20)] for name, more in curves.items()
    }
    panels = found["guidance.png"].axes
    assert panels[3].get_title().startswith("agreement: ")  # of a model with classes
    agreement = [[0, 0], [2, 0.5], [3, 0.75]]
    names = [f"dpm++, {steps} steps, {guide}" for guide in ("early", "unlabelled") for steps in (5, 10, 20)]
    assert drawn(panels[3]) == dict.fromkeys(names, agreement)
    assert drawn(panels[0])["dpm++, 5 steps, unlabelled"] == [[0, 10], [2, 17], [3, 18]]


def test_one_sweep_makes_one_figure(add, figures):
    for w in (0, 1, 2):
        add(measured(5.0 - w, SamplerConfig("sde-dpm++", 6, w)))
    assert list(figures()) == ["guidance.png"]


def test_nothing_measured_is_said_in_one_line(add, narrow, tmp_path):
    def refused(folder, *flags):
        with pytest.raises(UserError) as error:
            sweeps.main([str(folder), *flags])
        return str(error.value)

    run = narrow / "ddpm"
    message = f"{run}: nothing was measured with 10 samples and several steps or several w"
    assert refused(run, "--frechet", "10") == message
    other = load_run(narrow / "classes").params  # numbers of other weights
    for steps in (5, 6):
        numbers = measured(float(steps), SamplerConfig("ddim", steps))
        files.add_evaluation(run / "metrics.json", other, "frechet_10", numbers, 0)
    assert refused(run, "--frechet", "10") == message
    add({"training images": measured(1.0), "VAE": measured(50.0)} | measured(3.0, SamplerConfig("ddim", 5)))
    add(measured(2.0, SamplerConfig("sde-dpm++", 6, 0.5)))
    assert refused(run, "--frechet", "10") == message  # neither two steps of one sampler, nor two w
    add(measured(2.0, SamplerConfig("ddim", 6)), N=20)
    assert refused(run, "--frechet", "10") == message  # of another number of samples
    assert "nothing was measured with 10000 samples" in refused(run)
    vae = narrow / "vae"  # which has no sampler to compare
    files.add_evaluation(vae / "metrics.json", load_run(vae).params, "frechet_10", {"VAE": measured(5.0)}, 0)
    assert "nothing was measured" in refused(vae, "--frechet", "10")
    assert "no such file" in refused(tmp_path)
    assert not list(narrow.glob("*/*.png"))
