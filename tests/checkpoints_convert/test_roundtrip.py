import json

import pytest
import torch

from checkpoints_convert.roundtrip import _differing, roundtrip
from mimo_jax.errors import UserError
from tests.checkpoints_convert import originals


def test_every_tensor_comes_through_and_a_changed_one_is_noticed(tmp_path, capsys):
    config = originals.mimo_config(frozen_dtype="bfloat16")
    assert roundtrip(config, tmp_path / "there") == 0
    assert "GB of disk space" in capsys.readouterr().out.splitlines()[0]
    report = json.loads((tmp_path / "there" / "report.json").read_text())
    assert report["differing"] == [] and report["checked"] == sum(report["tensors"].values())
    assert report["peak_rss_anon_gib"] > 0 and report["ratio"] > 0

    sources = tmp_path / "there" / "sources"
    tensors = torch.load(sources / "sam.pth")
    tensors["mask_decoder.iou_token.weight"][0, 3] += 1
    torch.save(tensors, sources / "sam.pth")
    given = {"vision": sources / "vision", "llm": sources / "llm", "sam": sources / "sam.pth"}
    assert _differing(config, given, tmp_path / "there" / "import")[0] == ["sam: mask_decoder.iou_token.weight"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("checkpoints_convert.roundtrip.shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="its disk has 0.0 GB free"):
        roundtrip(originals.mimo_config(), tmp_path / "there")
    assert not any((tmp_path / "there").iterdir())
