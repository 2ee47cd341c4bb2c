"""docs/sweeps.py: the figures of what `evaluate` has measured with several steps, or with several w."""

from dataclasses import asdict

from scratchgen import plots
from scratchgen.data import UserError
from scratchgen.machinery import cli, files
from scratchgen.samplers import SamplerConfig
from scratchgen.trained import load_run

import pytest
from conftest import script

sweeps = script("docs/sweeps.py")


def measured(distance, config=None):
    """What metrics.json says of samples, as `reports.measure_samples` puts it there."""
    numbers = {"distance": distance, "precision": distance / 10, "recall": distance / 20, "share": [0.1] * 10}
    return {str(config): numbers | asdict(config)} if config else numbers


@pytest.fixture
def add(folder):
    def add(numbers, N=10, seed=0):
        path = folder / "ddpm" / "metrics.json"
        files.add_evaluation(path, load_run(folder / "ddpm").params, f"frechet_{N}", numbers, seed)

    return add


@pytest.fixture
def figures(folder, monkeypatch, capsys):
    """Call the program; {name: figure} of what it wrote into the run's folder."""

    def call(*flags):
        saved = {}
        with monkeypatch.context() as patch:
            save = plots.save
            patch.setattr(plots, "save", lambda figure, path: saved.update({path: figure}) or save(figure, path))
            sweeps.main([str(folder / "ddpm"), "--frechet", "10", *flags])
        assert all(path.parent == folder / "ddpm" and path.stat().st_size > 1000 for path in saved)
        names = [path.name for path in saved]
        assert capsys.readouterr().out == f"wrote {' and '.join(names)} in {folder / 'ddpm'}\n"
        return {path.name: figure for path, figure in saved.items()}

    return call


def drawn(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines if len(line.get_xydata()) > 2}


def test_what_was_measured_with_several_steps_and_with_several_w(add, figures):
    add({"training images": measured(1.0), "VAE": measured(50.0)})
    for steps, distance in ((200, 3.0), (10, 30.0), (20, 9.0)):  # in any order, and by several calls of `evaluate`
        add(measured(distance, SamplerConfig("ddpm", steps)))
    for w, distance in ((1, 4.0), (0, 5.0), (0.5, 2.0)):
        add(measured(distance, SamplerConfig("sde-dpm++", 20, w)))
    found = figures()
    assert list(found) == ["steps.png", "guidance.png"]

    (axes,) = found["steps.png"].axes
    assert drawn(axes) == {"ddpm": [[10, 30], [20, 9], [200, 3]]}  # what had 20 steps alone is no curve
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "20", "200"]
    assert {text.get_text() for text in axes.texts} == {"training images", "VAE"}
    levels = [line.get_ydata() for line in axes.lines if len(line.get_xydata()) == 2]
    assert [level[0] for level in levels] == [1, 50]
    assert axes.get_title() == "Fréchet distance of 10 samples"

    panels = found["guidance.png"].axes
    titles = [axes.get_title() for axes in panels]
    assert [title.split(":")[0] for title in titles] == ["Fréchet distance, 10 samples", "precision", "recall"]
    assert [axes.get_ylim()[0] for axes in panels] == [0, 0, 0] and panels[1].get_ylim()[1] == 1
    (name,) = drawn(panels[0])
    assert name == "sde-dpm++, 20 steps, early"
    assert drawn(panels[0])[name] == [[0, 5], [0.5, 2], [1, 4]]
    assert drawn(panels[1])[name] == [[0, 0.5], [0.5, 0.2], [1, 0.4]]


def test_each_sampler_guide_and_w_has_a_curve(add, figures):
    for steps in (5, 10, 20):
        for sampler, w in (("ddim", 0), ("dpm++", 0), ("dpm++", 2), ("dpm++", 3)):
            for guide in ("early", "unlabelled") if w else ("early",):
                config = SamplerConfig(sampler, steps, w, guide)
                add(
                    {name: one | {"agreement": w / 4} for name, one in measured(steps + w + len(guide), config).items()}
                )
    found = figures()
    assert drawn(found["steps.png"].axes[0]).keys() == {
        "ddim",
        "dpm++",
        *(f"dpm++, w = {w}, {guide}" for w in (2, 3) for guide in ("early", "unlabelled")),
    }
    panels = found["guidance.png"].axes
    assert panels[3].get_title().startswith("agreement: ")  # of a model with classes
    lines = {line.get_label(): line.get_xydata()[:, 0].tolist() for line in panels[3].lines}
    assert lines["dpm++, 5 steps, unlabelled"] == [0, 2, 3]
    assert lines["dpm++, 10 steps, early"] == [0, 2, 3]
    assert len(lines) == 6 and not any("ddim" in name for name in lines)


def test_one_sweep_makes_one_figure(add, figures, folder):
    for w in (0, 1, 2):
        add(measured(5.0 - w, SamplerConfig("sde-dpm++", 6, w)))
    assert list(figures()) == ["guidance.png"]
    assert not (folder / "ddpm" / "steps.png").exists()


def refused(folder, *flags):
    with pytest.raises(UserError) as error:
        sweeps.main([str(folder), *flags])
    return str(error.value)


def test_nothing_measured_is_said_in_one_line(add, folder):
    run = folder / "ddpm"
    message = f"{run}: nothing was measured with 10 samples and several steps or several w"
    assert refused(run, "--frechet", "10") == message
    add({"training images": measured(1.0), "VAE": measured(50.0)} | measured(3.0, SamplerConfig("ddim", 5)))
    add(measured(2.0, SamplerConfig("sde-dpm++", 6, 0.5)))
    assert refused(run, "--frechet", "10") == message  # neither two steps of one sampler, nor two w
    add(measured(2.0, SamplerConfig("ddim", 6)), N=20)
    assert refused(run, "--frechet", "10") == message  # of another number of samples
    assert "nothing was measured with 10000 samples" in refused(run)
    with pytest.raises(cli.UsageError):
        sweeps.main([str(run)])
    (run / "metrics.json").unlink()
    assert refused(run, "--frechet", "10") == message
    assert list(run.glob("steps.png")) == list(run.glob("guidance.png")) == []


def test_numbers_of_other_weights_are_not_drawn(folder):
    path = folder / "ddpm" / "metrics.json"
    for steps in (5, 10):
        numbers = measured(float(steps), SamplerConfig("ddim", steps))
        files.add_evaluation(path, load_run(folder / "vae").params, "frechet_10", numbers, 0)
    assert "nothing was measured" in refused(folder / "ddpm", "--frechet", "10")


def test_a_vae_has_no_sampler_to_compare(folder):
    files.add_evaluation(
        folder / "vae" / "metrics.json", load_run(folder / "vae").params, "frechet_10", {"VAE": measured(5.0)}, 0
    )
    assert "nothing was measured" in refused(folder / "vae", "--frechet", "10")


def test_a_folder_without_a_run(tmp_path):
    assert "no such file" in refused(tmp_path)
