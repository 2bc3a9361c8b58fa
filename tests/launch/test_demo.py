"""What `make demo` makes: a page that stands alone, and somebody's own data of phantoms."""

import base64
import html.parser
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimo_jax.data.builder.phantom_set import build_phantoms
from mimo_jax.data.loading.sources import open_source

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The module launch/demo.py, in an empty working folder with a few phantoms."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    monkeypatch.chdir(tmp_path)
    import demo

    build_phantoms(demo.PHANTOMS, 40, seed=7, progress=False)
    return demo


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, content: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone(demo, tmp_path):
    from demo_page import Figure, Section, write_page

    Image.new("RGB", (5, 4), "red").save(tmp_path / "a.png")
    figure = Figure(tmp_path / "a.png", "A <picture>", 'Is "this" red?', "It is.")
    write_page(tmp_path / "demo.html", [Section("One & two", "Text.", [figure, figure])], ["mimo ask --checkpoint tiny a.png 'What?'"])
    page = Page((tmp_path / "demo.html").read_text())
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == ['A <picture>. Question: Is "this" red? Answer: It is.'] * 2
    content = base64.b64decode(images[0]["src"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(content)).size == (5, 4)
    assert "Research use only." in page.text and "One & two" in page.text and "mimo ask --checkpoint tiny a.png 'What?'" in page.text
    outside = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(value.startswith("data:") for value in outside)


def test_the_data_of_the_fine_tuning_are_whole(demo):
    demo.INVERTED.mkdir(parents=True)
    demo.write_inverted(demo.INVERTED / "manifest.jsonl")
    lines = [json.loads(line) for line in (demo.INVERTED / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) == 40 and {line["split"] for line in lines} == {"train", "val", "test"}
    record = open_source(demo.INVERTED / "manifest.jsonl", "test")[0]
    theirs = demo.RecordFolder(demo.PHANTOMS, "test")
    other = next(found for found in (theirs[i] for i in range(len(theirs))) if record.id.endswith(found.id))
    pixels, before = (np.asarray(Image.open(io.BytesIO(found.image)).convert("L")).astype(int) for found in (record, other))
    assert np.array_equal(pixels, 255 - before)
    assert sorted(mask.area_px for mask in record.masks) == sorted(mask.area_px for mask in other.masks)


def test_a_model_that_cannot_be_fetched_is_left_out(demo, capfd):
    assert not demo.fetched("no_such_model")
    out = capfd.readouterr()
    assert "the tiny model is shown alone" in out.out and "mimo: error: no_such_model: is not a named model" in out.err


@pytest.mark.slow
def test_the_whole_demo(demo, tmp_path):
    """With a step of fine-tuning and few questions."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'launch')!r}); import demo; demo.STEPS, demo.SAMPLES = 2, 4; sys.exit(demo.main())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    page = Page((tmp_path / "runs" / "demo" / "demo.html").read_text())
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) >= 4 + len(demo.REAL) + 2 and all(image["alt"] for image in images)
    assert "What to type next" in done.stdout
