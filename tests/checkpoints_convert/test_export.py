"""What is exported loads in transformers, peft and segment-anything without a warning, and computes what our model computes."""

import json
import shutil
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from checkpoints_convert import export
from checkpoints_convert.convert import ImportRequest, import_checkpoint
from checkpoints_convert.export import export_checkpoint
from checkpoints_convert.sources import SourceError
from mimo_jax import parameters, pathtree
from mimo_jax.checkpoints import checkpoint, frozen_params, loading, provenance
from mimo_jax.cli import main
from mimo_jax.data.tokenizer import load_tokenizer
from mimo_jax.errors import UserError
from mimo_jax.infer.predictor import Mimo
from mimo_jax.model_config import LoraConfig
from mimo_jax.models import mimo, scan
from tests.checkpoints_convert import originals
from tests.checkpoints_convert.test_joint import LISA_ADDED, lisa_folder
from tests.checkpoints_convert.torch_models import LisaOracle, MimoOracle, sam_model
from tests.models.oracles import relative_l2
from tests.tiny_config import random_params

IDS = np.random.default_rng(3).integers(3, originals.PIECES, (2, 15))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A MIMO import with LoRA that does something."""
    folder = tmp_path_factory.mktemp("mimo")
    config = originals.mimo_config()
    oracle = MimoOracle(config)
    originals.put_tensors(folder / "mimo", oracle.state_dict(vision_tower=True))
    originals.put_tokenizer(folder / "mimo", {"<p>": 420, "</p>": 421, "<SEG>": 422})
    import_checkpoint(ImportRequest(config, {"joint": folder / "mimo"}, folder / "run", lora_alpha=8.0, log=lambda line: None))
    return folder / "run"


@pytest.fixture(scope="module")
def model(run):
    config, params, *_ = loading.load_for_inference(run)
    graphdef, _ = mimo.abstract(config)
    return scan.bind(graphdef, params)


def logits_here(model) -> np.ndarray:
    positions = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    return np.asarray(model.logits(model.decode(model.embedding(jnp.asarray(IDS)), positions)))


def quietly(load):
    """What `load` gives, with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft's own use of transformers
        return load()


def logits_there(language) -> np.ndarray:
    with torch.no_grad():
        return language.eval()(torch.tensor(IDS)).logits.numpy()


def test_transformers_loads_clip_and_the_language_model(run, model, tmp_path, caplog):
    export_checkpoint(run, "hf", tmp_path / "hf")
    clip, told = quietly(lambda: transformers.CLIPVisionModel.from_pretrained(tmp_path / "hf" / "vision", output_loading_info=True))
    assert not any(told.values()), told
    language, told = quietly(lambda: transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf" / "llm", output_loading_info=True))
    assert not any(told.values()), told
    assert not caplog.records
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        wanted = clip.eval()(torch.tensor(pixels), output_hidden_states=True).hidden_states[-1][:, 1:].numpy()
    assert relative_l2(model.vision(jnp.asarray(pixels.transpose(0, 2, 3, 1))), wanted) <= 1e-5
    assert relative_l2(logits_here(model), logits_there(language)) <= 1e-5, "LoRA is merged"


def test_transformers_reads_the_same_text_into_the_same_ids(run, tmp_path):
    export_checkpoint(run, "hf", tmp_path / "hf")
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf" / "llm")
    here = load_tokenizer(run / "tokenizer.json")
    for text in ("Where is the liver?", "  two  spaces, 3.5 mg/kg", "łódź 肝臓"):
        assert there(text).input_ids == [1, *here.encode(text)]
    assert there.convert_tokens_to_ids(["<p>", "</p>", "<SEG>"]) == [420, 421, 422]


def test_peft_puts_the_adapter_on_the_language_model_exported_apart(run, model, tmp_path, caplog):
    export_checkpoint(run, "hf", tmp_path / "hf", merge=False)
    export_checkpoint(run, "peft", tmp_path / "adapter")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf" / "llm")
    assert relative_l2(logits_here(model), logits_there(plain)) > 1e-3, "LoRA is apart"
    adapted = quietly(lambda: peft.PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    assert not caplog.records
    assert relative_l2(logits_here(model), logits_there(adapted)) <= 1e-5


def test_segment_anything_loads_sam(run, model, tmp_path):
    export_checkpoint(run, "sam", tmp_path / "sam")
    config = checkpoint.read_config(run).model.sam
    (file,) = (tmp_path / "sam").glob("*.pth")
    sam = sam_model(config).eval()
    sam.load_state_dict(torch.load(file, weights_only=True), strict=True)
    pixels = np.random.default_rng(0).standard_normal((1, config.image_size, config.image_size, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = sam.image_encoder(torch.tensor(pixels.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    assert relative_l2(model.sam_encoder(jnp.asarray(pixels)), wanted) <= 1e-5


def flat(run: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in pathtree.flatten(loading.load_params(run)).items()}


def assert_same_bits(a: Path, b: Path) -> None:
    first, second = flat(a), flat(b)
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        assert leaf.dtype == second[path].dtype and leaf.tobytes() == second[path].tobytes(), path
    assert frozen_params.read_record(a)["fingerprint"] == frozen_params.read_record(b)["fingerprint"]
    assert provenance.read(a)["parameters"] == provenance.read(b)["parameters"]
    assert (a / "tokenizer.json").read_text() == (b / "tokenizer.json").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_export_import_gives_the_same_bits(tmp_path, dtype):
    config = originals.mimo_config(frozen_dtype=dtype)
    oracle = MimoOracle(config)
    originals.put_tensors(tmp_path / "mimo", oracle.state_dict(vision_tower=True))
    originals.put_tokenizer(tmp_path / "mimo", {"<p>": 420, "</p>": 421, "<SEG>": 422})
    say = {"log": lambda line: None}
    import_checkpoint(ImportRequest(config, {"joint": tmp_path / "mimo"}, tmp_path / "first", lora_alpha=8.0, **say))
    export_checkpoint(tmp_path / "first", "joint", tmp_path / "joint", merge=False)
    again = originals.mimo_config(frozen_dtype=dtype)
    import_checkpoint(ImportRequest(again, {"joint": tmp_path / "joint"}, tmp_path / "second", **say))
    assert_same_bits(tmp_path / "first", tmp_path / "second")


@pytest.mark.slow
def test_the_three_towers_too_give_the_same_bits(tmp_path):
    config = originals.mimo_config(lora=LoraConfig(rank=0))
    given = originals.put_three(tmp_path / "originals", config)
    say = {"log": lambda line: None}
    import_checkpoint(ImportRequest(config, given, tmp_path / "first", **say))
    export_checkpoint(tmp_path / "first", "hf", tmp_path / "hf")
    export_checkpoint(tmp_path / "first", "sam", tmp_path / "sam")
    exported = {"vision": tmp_path / "hf" / "vision", "llm": tmp_path / "hf" / "llm", "sam": next((tmp_path / "sam").glob("*.pth"))}
    again = originals.mimo_config(lora=LoraConfig(rank=0))
    import_checkpoint(ImportRequest(again, exported, tmp_path / "second", **say))
    first, second = flat(tmp_path / "first"), flat(tmp_path / "second")
    for path in first:
        assert first[path].tobytes() == second[path].tobytes(), path
    assert (tmp_path / "first" / "tokenizer.json").read_text() == (tmp_path / "second" / "tokenizer.json").read_text()


def test_a_lisa_goes_back_to_the_rows_and_names_that_it_had(tmp_path):
    config = originals.lisa_config(lora=LoraConfig(rank=0))
    config.model.llm.vocab_size = originals.PIECES + 2
    oracle = LisaOracle(config, originals.PIECES + 3)
    folder = lisa_folder(tmp_path, oracle, LISA_ADDED, vision_tower=True)
    import_checkpoint(ImportRequest(config, {"joint": folder}, tmp_path / "first", log=lambda line: None))
    export_checkpoint(tmp_path / "first", "joint", tmp_path / "joint")
    wanted = oracle.state_dict(vision_tower=True)
    found = load_file(tmp_path / "joint" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "joint")
    assert tokenizer.convert_tokens_to_ids(list(LISA_ADDED)) == list(LISA_ADDED.values())


def test_glamms_region_encoder_comes_back(tmp_path):
    config = originals.lisa_config(lora=LoraConfig(rank=0), seg_position="after")
    config.model.aligner.kind = "mlp"
    config.model.llm.vocab_size, config.data.image_tokens = originals.PIECES, ""
    oracle = LisaOracle(config, originals.PIECES + 3, glamm=True)
    folder = lisa_folder(tmp_path, oracle, {"<p>": 420, "</p>": 421, "[SEG]": 422}, vision_tower=True)
    import_checkpoint(ImportRequest(config, {"joint": folder}, tmp_path / "first", log=lambda line: None))
    export_checkpoint(tmp_path / "first", "joint", tmp_path / "joint")
    wanted = {key: value for key, value in oracle.state_dict().items() if "region_encoder" in key}
    found = load_file(tmp_path / "joint" / "model.safetensors")
    assert wanted and all(torch.equal(found[key], value) for key, value in wanted.items())


def test_one_directory_needs_no_other(run, tmp_path):
    (tmp_path / "runs").mkdir()
    shutil.copytree(run, tmp_path / "runs" / "import")
    assert (
        main.main(
            ["convert", "export", "--checkpoint", str(tmp_path / "runs" / "import"), "--format", "mimo", "--out", str(tmp_path / "m")]
        )
        == 0
    )
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "m").rename(tmp_path / "moved")
    assert_same_bits(run, tmp_path / "moved")
    assert Mimo.load(tmp_path / "moved").config == checkpoint.read_config(run)


def test_a_merged_export_is_a_model_without_lora(run, tmp_path):
    export_checkpoint(run, "joint", tmp_path / "joint")
    keys = load_file(tmp_path / "joint" / "model.safetensors").keys()
    assert not any("lora" in key for key in keys)
    assert json.loads((tmp_path / "joint" / "config.json").read_text())["vocab_size"] == originals.PIECES + 3


def test_what_cannot_be_exported_is_refused_and_nothing_written(run, tmp_path):
    config = originals.mimo_config(lora=LoraConfig(rank=0))
    given = originals.put_three(tmp_path / "originals", config)
    import_checkpoint(ImportRequest(config, given, tmp_path / "plain", log=lambda line: None))
    with pytest.raises(UserError, match="has no LoRA to export"):
        export_checkpoint(tmp_path / "plain", "peft", tmp_path / "out")
    with pytest.raises(UserError, match="already exists"):
        export_checkpoint(run, "hf", tmp_path / "plain")
    with pytest.raises(UserError, match="does not exist"):
        export_checkpoint(tmp_path / "gone", "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stored", "dtype"), [("float32", ""), ("bfloat16", ""), ("bfloat16", "float32"), ("float32", "float16")])
def test_a_merge_tells_what_rounding_takes_from_the_update(tmp_path, stored, dtype):
    """Against torch's own rounding of the sum in float32, for a small update."""
    config = originals.mimo_config(frozen_dtype=stored)
    _, shapes = mimo.abstract(config)
    trains, kinds = parameters.multipliers(config, shapes), pathtree.flatten(parameters.with_dtypes(config, shapes))
    params = {path: (0.05 * leaf).astype(kinds[path].dtype) for path, leaf in pathtree.flatten(random_params(config)).items()}
    checkpoint.start_run(tmp_path, config, pathtree.unflatten({path: leaf for path, leaf in params.items() if trains[path] is None}))
    checkpoint.write_step(tmp_path, 0, ((path, leaf) for path, leaf in params.items() if trains[path] is not None), {})
    rounding, root = export._Rounding(jnp.dtype(dtype) if dtype else None), "llm/layers/block/q"
    dtype = dtype or stored
    merged = export._Language(loading.LazyParams(tmp_path), rounding)[f"{root}/kernel"]
    before, a, b = (torch.tensor(params[f"{root}/{name}"].astype(np.float32)) for name in ("kernel", "lora_a", "lora_b"))
    exact = before + 2.0 * a @ b  # alpha 8, rank 4
    wanted = exact.to(getattr(torch, dtype)).float()
    assert merged.dtype == jnp.dtype(dtype)
    rtol = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-10}[dtype]
    np.testing.assert_allclose(merged.astype(np.float32), wanted, rtol=rtol, atol=1e-7)
    share = float((exact - wanted).norm() / (exact - before).norm())
    if dtype == "float32":
        assert rounding.lines() == []
    else:
        assert share > 1e-4 and (rounding.lost / rounding.update) ** 0.5 == pytest.approx(share, rel=1e-3)
        assert f"an error of {share:.1%} of its update" in rounding.lines()[0]


@pytest.mark.parametrize("format", ["hf", "joint"])
def test_a_merged_language_model_is_written_in_the_dtype_that_is_asked_for(run, tmp_path, format):
    """Each tensor is the one of the export in float32, rounded by torch; parts that are no language model stay as they are."""
    exact = files_of(run, tmp_path / "exact", format, "float32")
    half = files_of(run, tmp_path / "half", format, "float16")
    assert exact.keys() == half.keys()
    for name, tensors in exact.items():
        for key, tensor in tensors.items():
            language = key.startswith(("model.layers", "model.embed_tokens", "model.norm", "lm_head"))
            assert half[name][key].dtype == (torch.float16 if language else tensor.dtype), key
            assert torch.equal(half[name][key], tensor.to(half[name][key].dtype)), key


def files_of(run, out, format: str, dtype: str) -> dict[str, dict[str, torch.Tensor]]:
    export_checkpoint(run, format, out, dtype=dtype)
    return {str(file.relative_to(out)): load_file(file) for file in out.rglob("*.safetensors")}


def test_a_dtype_without_a_place_or_without_the_range_is_refused(run, tmp_path):
    for format, merge in (("hf", False), ("peft", True), ("mimo", True), ("sam", True)):
        with pytest.raises(SourceError, match="--dtype: is for --format hf and joint with --lora merged"):
            export_checkpoint(run, format, tmp_path / "out", merge=merge, dtype="float16")
    with pytest.raises(SourceError, match="--dtype float16: llm/norm/scale has values beyond its range; use bfloat16 or float32"):
        export._rounded("llm/norm/scale", np.array([1e5], np.float32), np.dtype("float16"))
    assert not (tmp_path / "out").exists()
