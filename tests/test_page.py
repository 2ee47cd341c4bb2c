"""docs/latents.html is what docs/page.py makes; in a browser it computes what NumPy does, and its controls work."""

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

from scratchgen import vae
from scratchgen.data import load_fashion_mnist, scale
from scratchgen.trained import load_trained

import numpy as np
import pytest
from conftest import ROOT, script

page = script("docs/page.py")
HARNESS = Path(__file__).with_name("page_harness.js")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
BEGIN = """<script>
const inputs = INPUTS, seen = {faults: []};
addEventListener("error", event => seen.faults.push(event.message || `not loaded: ${event.target.outerHTML}`), true);
for (const kind of ["error", "warn"]) console[kind] = (...words) => seen.faults.push(words.join(" "));
addEventListener("load", () => {
  const results = document.createElement("pre");
  results.id = "results";
  results.textContent = JSON.stringify(seen);
  document.body.append(results);
});
</script>"""
N = 100


@pytest.fixture(scope="module")
def data():
    return load_fashion_mnist(ROOT / "data")


@pytest.fixture(scope="module")
def text():
    return page.PAGE.read_text(encoding="utf-8")


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def array(dtype, text):
    return np.frombuffer(base64.b64decode(text), dtype)


# ------------------------------------------------------------------------------------------------------------ the file


def test_the_page_is_what_the_program_makes_of_the_weights(data, text):
    """But for what the processor rounds: a code by one step, a KL by its last digit."""
    there, made = data_of(text), data_of(page.page(data))
    np.testing.assert_allclose(there.pop("kl"), made.pop("kl"), atol=2e-4)
    codes = [array(*each.pop("codes")).astype(int) for each in (there, made)]
    assert np.abs(codes[0] - codes[1]).max() <= 1
    assert there == made
    before, after = page.TEMPLATE.read_text(encoding="utf-8").split("DATA")
    assert text.startswith(before) and text.endswith(after)


def test_one_file_below_a_megabyte_that_loads_nothing(text):
    assert len(text.encode()) <= 1_000_000
    code = re.sub(r'(?s)<script type="application/json".*?</script>', "", text)
    assert not re.search(r"https?:|\bsrc=|<link|@import|url\(|fetch\(|XMLHttpRequest|import\(", code)


def test_its_data_are_the_test_set_and_its_codes(data, text):
    there = data_of(text)
    labels, numbers = array(*there["image_labels"]), there["image_numbers"]
    np.testing.assert_array_equal(labels, np.repeat(np.arange(10), 2))
    np.testing.assert_array_equal(labels, data["test_labels"][numbers])
    np.testing.assert_array_equal(array(*there["images"]), data["test_images"][numbers].ravel())
    assert np.bincount(array(*there["code_labels"])).tolist() == [100] * 10
    mu, log_var = load_trained("vae").encode(scale(data["test_images"], 0, 1))
    np.testing.assert_allclose(there["kl"], vae.kl_per_dimension(mu, log_var).mean(axis=0), atol=2e-4)
    assert (len(there["active"]), len(there["kl"])) == (8, 20)
    codes = array(*there["codes"]).reshape(1000, 8) * there["code_scale"]
    first = page.first_of_each_class(data["test_labels"], 100)
    np.testing.assert_allclose(codes, np.clip(mu[first][:, there["active"]], -127 / 32, 127 / 32), atol=1 / 64 + 1e-4)


def test_a_code_too_large_for_a_byte_stays_at_the_edge(data, monkeypatch):
    """Those of the package's weights fit; with a smaller scale they do not."""
    monkeypatch.setattr(page, "CODE_SCALE", 1 / 64)
    there = page.contents(data)
    mu, _ = load_trained("vae").encode(scale(data["test_images"], 0, 1))
    codes = mu[page.first_of_each_class(data["test_labels"], 100)][:, there["active"]]
    expected = np.clip(codes, -127 / 64, 127 / 64)
    assert codes.max() > 2 > -2 > codes.min()
    np.testing.assert_allclose(array(*there["codes"]).reshape(1000, 8) / 64, expected, atol=1 / 128 + 1e-4)


# ------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def inputs(data):
    """Codes of the prior, (N, D), and test images, (N, 28, 28, 1)."""
    return np.random.default_rng(0).standard_normal((N, 20), dtype=np.float32), data["test_images"][-N:]


@pytest.fixture(scope="module")
def seen(text, inputs, tmp_path_factory):
    """What the harness saw in Chromium, which is started once."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium, Debian's package chromium")
    folder = tmp_path_factory.mktemp("page")
    codes, images = (base64.b64encode(array.tobytes()).decode() for array in inputs)
    template = page.TEMPLATE.read_text(encoding="utf-8")
    given = json.dumps({"codes": codes, "images": images, "template": template}).replace("</", "<\\/")
    begin, end = BEGIN.replace("INPUTS", given), f"<script>{HARNESS.read_text(encoding='utf-8')}</script>"
    copy = text.replace("<head>", f"<head>{begin}", 1).replace("</body>", f"{end}</body>")
    (folder / "page.html").write_text(copy, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *QUIET]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1280,900", "--dump-dom"]
    command.append((folder / "page.html").as_uri())
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
    found = re.search(r'<pre id="results">(.*?)</pre>', result.stdout, re.S)
    assert found, result.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def levels(x):
    return np.round(255 * x.astype(np.float64)).ravel()


def largest_difference(greys, x):
    return np.abs(array(np.uint8, greys) - levels(x)).max()


def test_its_decoder_is_numpys_within_one_grey_level(seen, inputs):
    assert largest_difference(seen["decoded"], load_trained("vae").generate(inputs[0])) <= 1


def test_its_encoder_is_numpys(seen, inputs):
    model = load_trained("vae")
    mu, log_var = model.encode(scale(inputs[1], 0, 1))
    np.testing.assert_allclose(seen["mu"], mu.ravel(), atol=1e-4)
    np.testing.assert_allclose(seen["log_var"], log_var.ravel(), atol=1e-4)
    assert largest_difference(seen["restored"], model.generate(mu)) <= 1


def test_every_control_moves_what_it_says(seen):
    assert {what: result for what, result in seen["controls"].items() if result is not True} == {}
    assert len(seen["controls"]) == 16


def test_active_dimensions_change_the_garment_and_collapsed_ones_do_not(seen, text):
    active = data_of(text)["active"]
    moved = {int(d): grey for d, grey in seen["moved"].items()}  # the most that a pixel changes from z_d = 0 to 1.5
    assert min(moved[d] for d in active) > 20
    assert max(moved[d] for d in moved.keys() - set(active)) < 10


def test_nothing_goes_beyond_a_narrow_screen_and_the_garment_is_at_8_times_its_size(seen):
    assert seen["overhang"] == {width: [0, 224] for width in ("1280", "1000", "700", "390", "320")}


def test_no_error_in_the_console(seen):
    assert seen["faults"] == []
