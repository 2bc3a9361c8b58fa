"""Which pixels a SAM was trained on: recognised, demanded, and compared with the configuration."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints_convert.convert import ImportRequest, import_checkpoint
from checkpoints_convert.export import export_checkpoint
from checkpoints_convert.hf_config_check import SettingsError
from checkpoints_convert.sam_families import FAMILIES, check_family
from mimo_jax.cli import main
from mimo_jax.config import Config
from mimo_jax.model_config import PIXEL_NORMS, TinyVitConfig
from tests.checkpoints_convert import originals


def config(pixel_norm: str = "imagenet", image_fit: str = "pad", kind: str = "vit") -> Config:
    config = originals.mimo_config()
    if kind == "tiny_vit":
        config.model.sam = TinyVitConfig()
    config.model.sam.pixel_norm, config.model.sam.image_fit = pixel_norm, image_fit
    return config


@pytest.mark.parametrize("name, family", [
    ("sam_vit_h_4b8939.pth", "sam"),
    ("sam_vit_b_01ec64.pth", "sam"),
    ("sam-vit-huge", "sam"),
    ("medsam_vit_b.pth", "medsam"),
    ("MedSAM", "medsam"),
    ("medsam-vit-base", "medsam"),
    ("sam-med2d_b.pth", "sam-med2d"),
    ("lite_medsam.pth", "litemedsam"),
    ("medsam-lite.pth", "litemedsam"),
    ("mobile_sam.pt", "mobilesam"),
])  # fmt: skip
def test_a_family_is_recognised_by_the_names_of_its_files(tmp_path, name, family):
    row = FAMILIES[family]
    assert check_family("sam", tmp_path / name, config(row.pixel_norm, row.image_fit, row.kind)) is None
    other = next(norm for norm in PIXEL_NORMS if norm != row.pixel_norm)
    with pytest.raises(SettingsError, match=rf"{row.title}, .*set --config.model.sam.pixel_norm={row.pixel_norm} "):
        check_family("sam", tmp_path / name, config(other, row.image_fit, row.kind))


def test_a_folder_of_transformers_is_recognised_by_the_name_in_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam", "_name_or_path": "wanglab/medsam-vit-base"}))
    assert check_family("sam", tmp_path, config("minmax", "stretch")) is None
    with pytest.raises(SettingsError, match="is MedSAM"):
        check_family("sam", tmp_path / "model.safetensors", config())


def test_another_fit_is_only_remarked_upon(tmp_path):
    said = check_family("sam", tmp_path / "medsam_vit_b.pth", config("minmax", "pad"))
    assert said is not None and said.endswith("the configuration has pad; --config.model.sam.image_fit=stretch changes it")


def test_what_no_name_shows_is_demanded_and_taken(tmp_path):
    with pytest.raises(SettingsError, match=r"give --sam-family: medsam \(minmax\), .*or other if .*pixel_norm=none is right$"):
        check_family("sam", tmp_path / "best.pth", config("none"))
    assert check_family("sam", tmp_path / "best.pth", config("none"), "other") is None
    assert check_family("sam", tmp_path / "best.pth", config("minmax", "stretch"), "medsam") is None
    with pytest.raises(SettingsError, match=r"--config.model.sam.pixel_norm=minmax "):
        check_family("sam", tmp_path / "best.pth", config(), "medsam")
    with pytest.raises(
        SettingsError, match="--sam-family lisa: is unknown; use one of litemedsam, mobilesam, medsam, sam-med2d, sam, other$"
    ):
        check_family("sam", tmp_path / "best.pth", config(), "lisa")


def test_lisa_and_glamm_have_the_pixels_of_sam(tmp_path):
    assert check_family("joint", tmp_path, config()) is None
    with pytest.raises(SettingsError, match="pixel_norm=imagenet"):
        check_family("joint", tmp_path, config("minmax"))


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("given")
    paths = originals.put_three(folder, config())
    shutil.move(paths["sam"], folder / "best.pth")
    return paths | {"sam": folder / "best.pth"}


def test_import_demands_it_before_anything_is_written(given, tmp_path, capsys):
    file = originals.config_file(tmp_path / "config", config())
    command = ["convert", "import", "--config", file, *originals.flags_of(given), "--out", str(tmp_path / "out")]
    assert main.main(command) == 2 and "give --sam-family" in capsys.readouterr().err
    assert main.main([*command, "--sam-family", "medsam"]) == 2 and "pixel_norm=minmax" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_exported_comes_back_with_its_pixels(given, tmp_path):
    import_checkpoint(ImportRequest(config("minmax"), given, tmp_path / "import", sam_family="medsam", log=lambda line: None))
    for format, name in (("sam", "sam"), ("joint", "joint")):
        export_checkpoint(tmp_path / "import", format, tmp_path / format)
        path = next((tmp_path / format).glob("*.pth"), tmp_path / format)
        assert check_family(name, path, config("minmax")) is None
        with pytest.raises(SettingsError, match="an export of this project, trained with pixel_norm minmax"):
            check_family(name, path, config())
    back = torch.load(next((tmp_path / "sam").glob("*.pth")))
    for key, value in torch.load(given["sam"]).items():
        np.testing.assert_array_equal(back[key].numpy(), value.numpy())
