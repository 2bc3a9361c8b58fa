"""`mimo convert import`: what it refuses, what it records, and that it leaves a whole checkpoint or nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from checkpoints_convert.convert import ImportRequest, import_checkpoint
from mimo_jax import pathtree
from mimo_jax.checkpoints import checkpoint, frozen_params, loading, provenance
from mimo_jax.checkpoints.checkpoint import CheckpointError
from mimo_jax.cli import main
from mimo_jax.data.builder.phantom_set import build_phantoms
from mimo_jax.errors import UserError
from mimo_jax.infer.predictor import Mimo
from tests.checkpoints_convert import originals
from tests.checkpoints_convert.torch_models import MimoOracle


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> dict[str, Path]:
    return originals.put_three(tmp_path_factory.mktemp("three"), originals.mimo_config())


@pytest.fixture(scope="module")
def imported(three, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("import") / "made"
    import_checkpoint(ImportRequest(originals.mimo_config(), three, out, log=lambda line: None))
    return out


@pytest.fixture
def copies(three, tmp_path) -> dict[str, Path]:
    """The originals, to be spoilt."""
    shutil.copytree(three["vision"].parent, tmp_path / "originals")
    return {name: tmp_path / "originals" / path.name for name, path in three.items()}


def request(given: dict[str, Path], out: Path, config=None, **options) -> ImportRequest:
    return ImportRequest(config or originals.mimo_config(), given, out, log=lambda line: None, **options)


def refused(match: str, given: dict[str, Path], tmp_path: Path, config=None, **options) -> str:
    """The message of an import that must be refused and leave nothing."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=match) as error:
        import_checkpoint(request(given, tmp_path / "out", config, **options))
    assert sorted(tmp_path.iterdir()) == before, "something half written was left"
    return str(error.value)


def edit(path: Path, change) -> None:
    """Change the tensors of a safetensors or torch file in place."""
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"}) if path.suffix == ".safetensors" else torch.save(tensors, path)


# --- what it makes


def test_an_import_is_a_checkpoint_whose_base_stays_frozen_and_whose_rest_trains(imported):
    config = originals.mimo_config()
    assert checkpoint.resolve(imported) == (imported, 0)
    params = pathtree.flatten(loading.load_params(imported))
    frozen = pathtree.flatten(frozen_params.load(imported))
    assert {p.split("/")[0] for p in frozen} == {"vision", "llm", "embedding", "lm_head", "sam_encoder", "sam_prompt"}
    assert {p.split("/")[0] for p in params.keys() - frozen.keys()} == {
        *("aligner", "prompt", "seg_projection", "sam_decoder", "llm", "embedding", "lm_head"),
    }
    assert checkpoint.read_config(imported).model == config.model


def test_frozen_parameters_are_kept_as_the_policy_says_whatever_the_dtype_of_the_source(tmp_path):
    config = originals.mimo_config(frozen_dtype="bfloat16")
    given = originals.put_three(tmp_path, config, torch.float16)
    import_checkpoint(request(given, tmp_path / "out", config))
    params = pathtree.flatten(loading.load_params(tmp_path / "out"))
    assert params["llm/layers/block/q/kernel"].dtype == jnp.bfloat16 and params["sam_encoder/neck_in/kernel"].dtype == jnp.bfloat16
    assert params["sam_decoder/mask_tokens"].dtype == jnp.float32 and params["sam_prompt/gaussian"].dtype == jnp.float32
    wanted = load_file(given["llm"] / "model.safetensors")["model.norm.weight"].to(torch.float32).numpy()
    np.testing.assert_array_equal(np.asarray(params["llm/norm/scale"]), wanted.astype(jnp.bfloat16))


def test_provenance_tells_every_source_and_what_no_one_has_trained(imported, three):
    record = provenance.read(imported)
    assert record["sources"].keys() == three.keys()
    llm = record["sources"]["llm"]
    assert llm["layout"] == ["Llama"] and llm["dtypes"] == {"float32": len(load_file(three["llm"] / "model.safetensors"))}
    shell = subprocess.run(["sha256sum", three["llm"] / "model.safetensors"], capture_output=True, text=True, check=True)
    assert llm["files"] == {"model.safetensors": shell.stdout.split()[0]}
    assert record["base"] == frozen_params.read_record(imported)["fingerprint"] and record["seed"] == 0
    assert {path.split("/")[0] for path in record["untrained"]} == {"aligner", "prompt", "seg_projection", "embedding", "lm_head"}
    assert "embedding/base" not in record["untrained"]
    assert all(re.search("lora_[ab]$", path) for path in record["neutral"]) and len(record["neutral"]) == 4


def test_the_same_sources_and_seed_give_the_same_checkpoint_and_another_seed_another(imported, three, tmp_path):
    records = [import_checkpoint(request(three, tmp_path / name, seed=seed)) for name, seed in (("again", 0), ("other", 1))]
    first = provenance.read(imported)
    assert (records[0]["base"], records[0]["parameters"]) == (first["base"], first["parameters"])
    assert records[1]["base"] == first["base"] and records[1]["parameters"] != first["parameters"]


def picture(folder: Path) -> str:
    path = folder / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(path)
    return str(path)


def test_what_was_never_trained_is_refused_by_those_who_ask_and_taken_by_training(imported, tmp_path, capsys):
    with pytest.raises(CheckpointError, match=r"never trained: aligner \(51\).*--allow-untrained"):
        Mimo.load(imported)
    assert main.main(["ask", "--checkpoint", str(imported), picture(tmp_path), "What is this?"]) == 2
    assert "never trained" in capsys.readouterr().err
    assert Mimo.load(imported, allow_untrained=True).origin.count("base ") == 1


def test_a_damaged_provenance_does_not_make_a_checkpoint_pass_for_trained(imported, tmp_path):
    shutil.copytree(imported, tmp_path / "copy")
    (tmp_path / "copy" / provenance.FILE).write_text("{")
    with pytest.raises(UserError, match="provenance.json: is damaged"):
        Mimo.load(tmp_path / "copy")


def test_the_tokenizer_comes_along_with_the_grounding_tokens_behind_it(imported):
    model = Mimo.load(imported, allow_untrained=True)
    assert model.tokenizer.vocab_size == originals.PIECES and model.tokenizer.seg == originals.PIECES + 2
    assert model.tokenizer.decode(model.tokenizer.encode("the left lung")) == "the left lung"


# --- the whole way


@pytest.mark.slow
def test_import_then_train_then_both_moved_then_ask(three, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    import_checkpoint(request(three, tmp_path / "runs" / "import"))
    build_phantoms(tmp_path / "data", 12, seed=0, workers=1)
    config = originals.mimo_config()
    config.model.max_segs, config.data.buckets, config.model.llm.max_length = 4, "256", 256
    config.train.steps = 2
    command = ["--config", originals.config_file(tmp_path / "config", config), "--data", str(tmp_path / "data")]
    runs = tmp_path / "runs"
    assert main.main(["train", *command, "--init", str(runs / "import"), "--workdir", str(runs / "b")]) == 0
    assert re.search(r"^weights +base \w+, vision ", capsys.readouterr().out, re.MULTILINE)
    assert not (runs / "b" / "base").exists(), "the import's base is referred to, not copied"
    assert provenance.read(runs / "b")["untrained"] == []

    runs.rename(tmp_path / "moved")
    ask = ["ask", "--checkpoint", str(tmp_path / "moved" / "b"), picture(tmp_path), "What is this?", "--box", "5,5,30,30", "--json"]
    # In a process of its own, with torch and transformers installed: neither may come along.
    code = (
        "import sys; from mimo_jax.cli.main import main; code = main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *ask], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith("[]") and "weights: vision " in done.stderr
    assert "entities" in json.loads(done.stdout.splitlines()[-1])

    # The base alone elsewhere, and another one in its place.
    (tmp_path / "moved" / "import").rename(tmp_path / "away")
    other = import_checkpoint(
        request(originals.put_three(tmp_path / "others", originals.mimo_config(), torch.bfloat16), tmp_path / "other")
    )
    assert other["base"] != frozen_params.read_record(tmp_path / "away")["fingerprint"]
    assert main.main([*ask, "--base", str(tmp_path / "other")]) == 2
    assert "is another base" in capsys.readouterr().err
    assert main.main([*ask, "--base", str(tmp_path / "away")]) == 0


# --- names and shapes


def test_every_misfit_of_every_source_is_listed_and_nothing_written(copies, tmp_path):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(3)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1].contiguous()

    edit(copies["llm"] / "model.safetensors", spoil)
    edit(copies["sam"], lambda tensors: tensors.pop("mask_decoder.mask_tokens.weight"))
    message = refused("do not fit", copies, tmp_path)
    for part in (
        "1 missing:\n  model.norm.weight\n",
        "1 left over:\n  model.layers.7.mlp.up_proj.weight\n",
        f"1 of another shape:\n  lm_head.weight [{originals.PIECES}, 15], wanted [{originals.PIECES}, 16]",
        "1 missing:\n  mask_decoder.mask_tokens.weight",
    ):
        assert part in message, message


def test_regexes_excuse_what_is_missing_or_left_over_and_are_recorded(copies, tmp_path):
    def spoil(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["extra.weight"] = torch.zeros(3)

    edit(copies["llm"] / "model.safetensors", spoil)
    refused("1 left over", copies, tmp_path, allow_missing=["up_proj"])
    record = import_checkpoint(request(copies, tmp_path / "out", allow_missing=["up_proj"], ignore_extra=["^extra"]))
    assert record["allowed_missing"] == ["model.layers.1.mlp.up_proj.weight"] and record["ignored_extra"] == ["extra.weight"]
    assert "llm/layers/block/up/kernel" in record["untrained"], "half of it is as the seed drew it"
    kernel = np.asarray(pathtree.flatten(loading.load_params(tmp_path / "out"))["llm/layers/block/up/kernel"])
    wanted = load_file(copies["llm"] / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].numpy().T
    np.testing.assert_array_equal(kernel[0], wanted)
    assert np.isfinite(kernel[1]).all() and kernel[1].std() > 0


def test_a_group_without_a_source_is_named_with_the_flag(three, tmp_path):
    given = {name: path for name, path in three.items() if name != "sam"}
    refused(r"no given checkpoint fills sam_decoder, sam_encoder, sam_prompt \(--sam or --joint\)", given, tmp_path)


def test_an_overlay_stands_in_for_what_it_holds(three, tmp_path):
    decoder = {key: value for key, value in torch.load(three["sam"]).items() if key.startswith("mask_decoder.")}
    tuned = {f"base_model.model.model.visual_model.{key}": value + 1 for key, value in decoder.items()}
    torch.save(tuned, tmp_path / "zero_to_fp32.bin")
    import_checkpoint(request(three | {"overlay": tmp_path / "zero_to_fp32.bin"}, tmp_path / "out"))
    params = pathtree.flatten(loading.load_params(tmp_path / "out"))
    np.testing.assert_array_equal(params["sam_decoder/mask_tokens"], decoder["mask_decoder.mask_tokens.weight"].numpy() + 1)
    encoder = torch.load(three["sam"])["image_encoder.neck.1.weight"].numpy()
    np.testing.assert_array_equal(params["sam_encoder/neck_in_norm/scale"], encoder)


def test_half_an_overlay_is_refused(three, tmp_path):
    torch.save({"model.layers.0.input_layernorm.weight": torch.zeros(16)}, tmp_path / "half.bin")
    # Nothing but a lone tensor of a stack of layers: no known model gives itself away by it.
    refused("no known model", three | {"overlay": tmp_path / "half.bin"}, tmp_path)
    (tmp_path / "rows.json").write_text('[["model.layers.{llm_layer}.input_layernorm.weight", "llm/layers/block/attention_norm/scale"]]')
    message = refused("1 missing", three | {"overlay": tmp_path / "half.bin"}, tmp_path, key_map=tmp_path / "rows.json")
    assert "model.layers.1.input_layernorm.weight" in message


# --- settings, LoRA, vocabulary


def test_settings_that_no_shape_shows_are_compared(three, tmp_path):
    config = originals.mimo_config()
    config.model.vision.activation, config.model.llm.eps = "quick_gelu", 1e-3
    message = refused("its settings differ from the configuration", three, tmp_path, config)
    assert "hidden_act is gelu, the configuration has quick_gelu: set --config.model.vision.activation=gelu" in message
    assert "rms_norm_eps is 1e-05, the configuration has 0.001: set --config.model.llm.eps=1e-05" in message


def test_an_adapter_of_lora(three, tmp_path):
    config = originals.mimo_config()
    oracle = MimoOracle(config, vocab_rows=originals.PIECES)
    oracle.peft.save_pretrained(tmp_path / "adapter")
    given = three | {"lora": tmp_path / "adapter"}
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["lora_alpha"] == 8
    import_checkpoint(request(given, tmp_path / "first"))
    params = pathtree.flatten(loading.load_params(tmp_path / "first"))
    wanted = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    np.testing.assert_array_equal(params["llm/layers/block/v/lora_b"][1], wanted.numpy().T)
    assert provenance.read(tmp_path / "first")["neutral"] == []

    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(about | {"base_model_name_or_path": "lmsys/vicuna-13b-v1.3"}))
    refused("is an adapter of lmsys/vicuna-13b-v1.3, .*--lora-base", given, tmp_path)
    import_checkpoint(request(given, tmp_path / "said", lora_base="lmsys/vicuna-13b-v1.3"))
    path.unlink()
    refused("with --lora-alpha", given, tmp_path)
    import_checkpoint(request(given, tmp_path / "told", lora_alpha=16.0))
    assert checkpoint.read_config(tmp_path / "told").model.lora.alpha == 16.0


def test_a_vocabulary_of_another_size_is_named_with_the_flag(three, tmp_path):
    config = originals.mimo_config()
    config.model.llm.vocab_size = 400
    refused(f"set --config.model.llm.vocab_size={originals.PIECES}", three, tmp_path, config)


def test_a_missing_tokenizer_is_an_error_with_the_remedy(copies, tmp_path):
    (copies["llm"] / "tokenizer.model").unlink()
    refused("put the checkpoint's tokenizer.model or tokenizer.json there, or name .*--config.tokenizer", copies, tmp_path)


# --- damage, and the disk


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_all_named(copies, tmp_path, value):
    def spoil(tensors):
        tensors["model.norm.weight"][3] = value
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = value

    edit(copies["llm"] / "model.safetensors", spoil)
    message = refused("2 tensors contain NaN or Inf", copies, tmp_path)
    assert "--llm: model.norm.weight" in message and "--llm: model.layers.0.mlp.up_proj.weight" in message
    record = import_checkpoint(request(copies, tmp_path / "out", allow_nonfinite=True))
    assert len(record["nonfinite"]) == 2


def test_one_parameter_under_two_names_with_other_values_is_refused(copies, tmp_path):
    def double(tensors):
        tensors["base_model.model.model.norm.weight"] = tensors["model.norm.weight"].clone()

    edit(copies["llm"] / "model.safetensors", double)
    import_checkpoint(request(copies, tmp_path / "same"))
    edit(copies["llm"] / "model.safetensors", lambda tensors: tensors["model.norm.weight"].add_(1))
    refused("are the same parameter with different values", copies, tmp_path)


def test_a_truncated_file_is_named(copies, tmp_path):
    path = copies["llm"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused("model.safetensors: is truncated or damaged", copies, tmp_path)


def test_a_target_that_is_there_or_has_no_folder_is_refused(three, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        import_checkpoint(request(three, tmp_path / "out"))
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    with pytest.raises(UserError, match="does not exist; create it first"):
        import_checkpoint(request(three, tmp_path / "no" / "out"))


LIMITED = """
import json, resource, sys
from pathlib import Path
from checkpoints_convert.convert import ImportRequest, import_checkpoint
from mimo_jax import process
from mimo_jax.errors import UserError
from tests.checkpoints_convert import originals
process.quiet_orbax()
given = {name: Path(path) for name, path in json.loads(sys.argv[1]).items()}
if sys.argv[3] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the tokenizer fits, the embedding does not
try:
    import_checkpoint(ImportRequest(originals.mimo_config(), given, Path(sys.argv[2]) / "out", log=lambda line: None))
except UserError as error:
    print(type(error).__name__, error)
"""


def limited(given: dict[str, Path], where: Path, how: str, prefix: list[str]) -> str:
    arguments = [json.dumps({name: str(path) for name, path in given.items()}), str(where), how]
    done = subprocess.run([*prefix, sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, timeout=200)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.strip()


def test_a_file_that_may_not_grow_leaves_nothing(three, tmp_path):
    said = limited(three, tmp_path, "limit", [])
    assert re.match(r"CheckpointError .*: cannot be written: File too large; fix that and run the same command again$", said), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [("size=1m", r"needs .* GB, its disk has 0.0 GB free"), ("ro", r"is not writable; choose another folder, or change its permissions")],
)
def test_a_disk_that_is_too_small_or_read_only_is_refused_before_anything_is_written(three, tmp_path, options, said):
    mounted = f'mount -t tmpfs -o {options} none {tmp_path} && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted, "sh"]
    try:
        subprocess.run([*inside, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine lets no test mount a small disk ({error}); the test above limits the size of files instead")
    assert re.match(rf"OutputFolderError --out .*: .*{said}", limited(three, tmp_path, "disk", inside))


def test_a_process_killed_in_mid_import_leaves_no_checkpoint_and_is_done_again(three, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(checkpoint, "write_step", killed)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process tidies nothing
    with pytest.raises(Killed):
        import_checkpoint(request(three, tmp_path / "out"))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [".out.partial"], "what is half written lies beside the target"
    with pytest.raises(CheckpointError):
        checkpoint.resolve(tmp_path / ".out.partial")
    import_checkpoint(request(three, tmp_path / "out"))
    assert os.listdir(tmp_path) == ["out"]
