"""A kind of source from outside the package: registered, named on the command line, built."""

import numpy as np
import pytest
from PIL import Image

from mimo_jax.cli.main import main
from mimo_jax.data.builder.items import Item, MaskRef
from mimo_jax.data.builder.readers import KINDS, register_reader
from mimo_jax.data.builder.readers.reader import DatasetReader
from mimo_jax.data.loading.sources import open_source


class Toy(DatasetReader):
    """CASE.png next to CASE.liver.png."""

    name = "toy"
    expected_layout = "CASE.png beside CASE.liver.png"

    def open(self):
        self.found = sorted(self.folder.glob("*.liver.png"))

    def items(self):
        for mask in self.found:
            case = mask.name.partition(".")[0]
            image = str(mask.with_name(f"{case}.png"))
            yield Item(case, image, "CT", self.dataset, f"{self.dataset}/{case}", (MaskRef("liver", str(mask)),), licence="CC0-1.0")


@pytest.fixture
def toy():
    register_reader("toy", Toy)
    yield
    del KINDS["toy"]


def test_a_registered_reader_builds_a_data_set(toy, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.default_rng(0)
    for case in range(12):
        Image.fromarray(rng.integers(0, 255, (48, 48, 3), np.uint8)).save(source / f"case{case}.png")
        mask = np.zeros((48, 48), np.uint8)
        mask[10:30, 5 + case : 25 + case] = 255
        Image.fromarray(mask).save(source / f"case{case}.liver.png")
    assert main(["data", "build", "--source", "toy", "--in", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    records = open_source(tmp_path / "out", "train")
    assert len(records) and all(m.entity == "liver" for i in range(len(records)) for m in records[i].masks)


def test_a_kind_is_registered_once(toy):
    with pytest.raises(ValueError, match="^source toy: is already registered as Toy"):
        register_reader("toy", Toy)
