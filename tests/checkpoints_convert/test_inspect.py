import json

import pytest
import torch

from checkpoints_convert.convert import ImportRequest, import_checkpoint
from checkpoints_convert.inspect import describe, inspect
from mimo_jax.cli import main
from mimo_jax.errors import UserError
from mimo_jax.model_config import LoraConfig
from tests.checkpoints_convert import originals
from tests.checkpoints_convert.test_joint import LISA_ADDED, lisa_folder
from tests.checkpoints_convert.torch_models import LisaOracle


def test_each_of_three_files_is_told_and_fits(tmp_path):
    config = originals.mimo_config()
    titles = {"vision": "CLIP vision tower, transformers", "llm": "Llama", "sam": "SAM"}
    for name, path in originals.put_three(tmp_path, config, torch.bfloat16).items():
        found = inspect(path, config)
        assert found["parts"] == [{"title": titles[name], "prefix": ""}] and set(found["dtypes"]) == {"bfloat16"}
        assert not found["missing"] and not found["left over"] and not found["of another shape"] and "other settings" not in found
        assert found["bytes"] <= sum(found["files"].values())


def test_the_parts_of_a_whole_lisa_are_found_behind_their_prefixes(tmp_path):
    config = originals.lisa_config(lora=LoraConfig(rank=0))
    config.model.llm.vocab_size = originals.PIECES + 2
    folder = lisa_folder(tmp_path, LisaOracle(config, originals.PIECES + 3), LISA_ADDED, vision_tower=True)
    found = inspect(folder, config)
    prefixes = {part["title"]: part["prefix"] for part in found["parts"]}
    assert prefixes == {
        "CLIP vision tower, transformers": "model.vision_tower.vision_tower.vision_model.",
        "Llama": "",
        "SAM": "model.visual_model.",
        "linear projector (LISA, LLaVA)": "",
        "projection of <SEG>": "",
    }
    assert not any(found[kind] for kind in ("missing", "left over", "of another shape"))


def test_what_misfits_a_config_is_listed(tmp_path, capsys):
    config = originals.mimo_config()
    paths = originals.put_three(tmp_path, config)
    tensors = torch.load(paths["sam"])
    del tensors["mask_decoder.mask_tokens.weight"]
    tensors["spare"] = torch.zeros(2)
    torch.save(tensors, paths["sam"])
    found = inspect(paths["sam"], config)
    assert found["missing"] == ["mask_decoder.mask_tokens.weight"] and found["left over"] == ["spare"]
    config.model.vision.eps = 1e-3
    assert inspect(paths["vision"], config)["other settings"] == [
        "layer_norm_eps is 1e-05, the configuration has 0.001: set --config.model.vision.eps=1e-05"
    ]
    file = originals.config_file(tmp_path / "config", config)
    assert main.main(["convert", "inspect", str(paths["sam"]), "--config", file]) == 0
    said = capsys.readouterr().out
    assert "part: SAM\n" in said and "missing: 1\n  mask_decoder.mask_tokens.weight\nleft over: 1\n  spare" in said
    assert main.main(["convert", "inspect", str(paths["sam"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == len(tensors)


def test_a_checkpoint_of_ours_tells_its_sources_and_what_is_untrained(tmp_path):
    config = originals.mimo_config()
    import_checkpoint(ImportRequest(config, originals.put_three(tmp_path, config), tmp_path / "out", log=lambda line: None))
    for path in (tmp_path / "out", tmp_path / "out" / "steps" / "0"):
        found = inspect(path)
        assert found["checkpoint"] == "mimo_jax, config test, step 0" and set(found["sources"]) == {"vision", "llm", "sam"}
        assert found["untrained"].startswith("aligner (51)")
        assert "parameters: aligner" in describe(found)


def test_what_is_no_checkpoint_at_all_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("weights")
    with pytest.raises(UserError, match="has no weights"):
        inspect(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"has no known model among its 1 tensors \(a"):
        inspect(tmp_path / "a.pth")
