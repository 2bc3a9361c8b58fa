"""Names of tensors as CLIP, SAM, Llama, PEFT and whole models write them: the same parameters out of each."""

import functools
import re
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from checkpoints_convert import layouts, name_map
from checkpoints_convert.sources import Source, SourceError
from configs import lisa_7b
from mimo_jax import pathtree
from mimo_jax.errors import UserError
from mimo_jax.model_config import LoraConfig
from mimo_jax.models import mimo
from tests.checkpoints_convert import originals, torch_models
from tests.checkpoints_convert.test_name_map import published
from tests.models import oracles

CONFIG = originals.mimo_config(lora=LoraConfig(rank=4))
INDICES = name_map.layer_indices(CONFIG.model)


@functools.cache
def leaves() -> dict:
    return pathtree.flatten(mimo.abstract(CONFIG)[1])


def imported(path: Path, pattern: str, tensors: dict | None = None) -> dict[str, np.ndarray]:
    """{path: array} of the parameters that a regex finds, out of a file or folder, in which nothing may be left over. tensors: what
    is put there first."""
    if tensors is not None:
        originals.put_tensors(path, tensors)
    source = Source("joint", path, INDICES)
    wanted = {path: leaf for path, leaf in leaves().items() if re.search(pattern, path)}
    name_map.check(source.shapes(), source.rows, INDICES, wanted, source.ignored)
    return dict(name_map.import_leaves(source, source.rows, INDICES, wanted))


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys() and found
    for path, value in wanted.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def renamed(tensors: dict, *changes: tuple[str, str]) -> dict:
    for pattern, replacement in changes:
        tensors = {re.sub(pattern, replacement, key): value for key, value in tensors.items()}
    return tensors


# --- CLIP


@functools.cache
def clip() -> transformers.CLIPVisionModel:
    return oracles.randomised(torch_models.clip_model(CONFIG.model.vision))


@pytest.fixture
def clip_parameters(tmp_path) -> dict[str, np.ndarray]:
    """Of what transformers 5 saves, which has no prefix."""
    clip().save_pretrained(tmp_path / "clip5")
    return imported(tmp_path / "clip5", "^vision/")


def whole_clip() -> dict[str, torch.Tensor]:
    """A CLIPModel around our vision tower, with the buffers that old versions saved."""
    text = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=clip().config.to_dict()))
    model.vision_model.load_state_dict(clip().state_dict())
    return model.state_dict() | {f"{tower}_model.embeddings.position_ids": torch.arange(9)[None] for tower in ("text", "vision")}


def open_clip() -> dict[str, torch.Tensor]:
    """The same tower as open_clip writes it, with its text tower beside it."""
    made = {"visual.proj": torch.zeros(16, 8)}
    names = {
        "embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
    }  # fmt: skip
    changes = ((r"pre_layrnorm", "ln_pre"), (r"post_layernorm", "ln_post"), (r"^encoder\.layers", "transformer.resblocks"),
               (r"layer_norm(\d)", r"ln_\1"), (r"self_attn", "attn"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"))  # fmt: skip
    packed = {}
    for key, value in renamed(clip().state_dict(), *changes).items():
        match = re.fullmatch(r"(.*attn\.)([qkv])_proj\.(weight|bias)", key)
        if match:
            packed.setdefault(f"visual.{match[1]}in_proj_{match[3]}", {})[match[2]] = value
        else:
            made[f"visual.{names.get(key, key)}"] = value
    made |= {key: torch.cat([parts[part] for part in "qkv"]) for key, parts in packed.items()}
    block = {"attn.in_proj_weight": torch.zeros(24, 8), "attn.in_proj_bias": torch.zeros(24), "ln_1.weight": torch.zeros(8)}
    made |= {f"transformer.resblocks.0.{key}": value for key, value in block.items()}
    made |= {"positional_embedding": torch.zeros(7, 8), "token_embedding.weight": torch.zeros(50, 8), "ln_final.weight": torch.zeros(8)}
    return made | {"text_projection": torch.zeros(8, 8), "logit_scale": torch.tensor(4.6), "attn_mask": torch.zeros(7, 7)}


@pytest.mark.parametrize("tensors", [
    lambda: renamed(clip().state_dict(), ("^", "vision_model.")),
    lambda: renamed(clip().state_dict(), ("^", "module.")),
    lambda: renamed(clip().state_dict(), ("^", "model.vision_tower.vision_tower.vision_model.")),
    whole_clip,
    open_clip,
    lambda: renamed(open_clip(), ("^", "module.")),
], ids=["prefix", "module", "llava", "whole", "open_clip", "open_clip module"])  # fmt: skip
def test_clip_in_every_layout(tmp_path, clip_parameters, tensors):
    assert_same(imported(tmp_path / "other", "^vision/", tensors()), clip_parameters)


@pytest.mark.parametrize("tensors", [whole_clip, open_clip])
def test_what_no_clip_file_holds_is_left_over(tmp_path, tensors):
    with pytest.raises(name_map.KeyMapError, match=r"1 left over:\n  visual_adapter.weight$"):
        imported(tmp_path / "other", "^vision/", tensors() | {"visual_adapter.weight": torch.zeros(2)})


def test_the_tower_itself_is_read_and_not_the_text_tower(clip_parameters):
    there = clip().state_dict()
    np.testing.assert_array_equal(clip_parameters["vision/layers/block/k/kernel"][1], there["encoder.layers.1.self_attn.k_proj.weight"].T)
    np.testing.assert_array_equal(clip_parameters["vision/post_norm/scale"], there["post_layernorm.weight"])


# --- SAM


def hf_sam() -> transformers.SamModel:
    """transformers' SAM of the configuration's sizes; its decoder with facebook's eps, for which it has 1e-6 by default."""
    c = CONFIG.model.sam
    vision = transformers.SamVisionConfig(
        hidden_size=c.width, output_channels=c.decoder_width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        image_size=c.image_size, patch_size=c.patch_size, mlp_dim=int(c.mlp_ratio * c.width), window_size=c.window,
        global_attn_indexes=list(range(c.global_every - 1, c.layers, c.global_every)), num_pos_feats=c.decoder_width // 2,
    )  # fmt: skip
    prompt = transformers.SamPromptEncoderConfig(hidden_size=c.decoder_width, image_size=c.image_size, patch_size=c.patch_size)
    decoder = transformers.SamMaskDecoderConfig(
        hidden_size=c.decoder_width, num_hidden_layers=c.decoder_layers, num_attention_heads=c.decoder_heads,
        mlp_dim=c.decoder_mlp_width, iou_head_hidden_dim=c.iou_head_width, layer_norm_eps=1e-5,
    )  # fmt: skip
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    torch.manual_seed(0)
    return oracles.randomised(transformers.SamModel(config)).requires_grad_(False)


MATRIX = "shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding"


def test_sam_of_transformers_is_facebooks(tmp_path):
    """Its tensors, respelt, are a whole Sam of segment-anything's, which computes the same."""
    theirs, c = hf_sam(), CONFIG.model.sam
    tensors = theirs.state_dict()
    spelt = layouts.normalize_keys(tensors)
    assert [names for names in spelt.values() if len(names) > 1] == [list(MATRIX)] and torch.equal(*(tensors[key] for key in MATRIX))
    sam = torch_models.sam_model(c).requires_grad_(False)
    sam.load_state_dict({key: tensors[names[0]] for key, names in spelt.items()}, strict=True)

    pixels = torch.randn(1, 3, c.image_size, c.image_size, generator=torch.Generator().manual_seed(1))
    features = sam.image_encoder(pixels)
    assert oracles.relative_l2(features, theirs.get_image_embeddings(pixels)) <= 1e-5
    points, labels = torch.tensor([[[20.0, 30.0], [50.0, 9.0]]]), torch.tensor([[1, 0]])
    sparse, dense = sam.prompt_encoder(points=(points, labels), boxes=None, masks=None)
    masks, scores = sam.mask_decoder(features, sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=True)
    out = theirs(image_embeddings=features, input_points=points[:, None], input_labels=labels[:, None], multimask_output=True)
    assert oracles.relative_l2(masks, out.pred_masks[:, 0]) <= 1e-5 and oracles.relative_l2(scores, out.iou_scores[:, 0]) <= 1e-5

    theirs.save_pretrained(tmp_path / "hf")
    parameters = imported(tmp_path / "hf", "^sam_")
    assert_same(imported(tmp_path / "both", "^sam_", tensors), parameters)
    assert_same(imported(tmp_path / "facebook", "^sam_", sam.state_dict()), parameters)
    assert_same(imported(tmp_path / "glamm", "^sam_", renamed(sam.state_dict(), ("^", "model.grounding_encoder."))), parameters)
    assert_same(imported(tmp_path / "lisa", "^sam_", renamed(sam.state_dict(), ("^", "base_model.model.model.visual_model."))), parameters)


@pytest.mark.parametrize("at", [0, 1])
def test_one_matrix_with_two_values_is_refused(tmp_path, at):
    tensors = hf_sam().state_dict()
    originals.put_tensors(tmp_path, tensors | {MATRIX[at]: tensors[MATRIX[at]] + 1})
    with pytest.raises(SourceError, match=f"({'|'.join(MATRIX)}) and ({'|'.join(MATRIX)}) are the same parameter with different values"):
        Source("sam", tmp_path, INDICES)


# --- LoRA


@functools.cache
def lora() -> peft.PeftModel:
    llama = torch_models.llama_model(CONFIG.model.llm, originals.PIECES)
    return oracles.randomised(peft.get_peft_model(llama, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")))


LLM, BARE = "^(llm/|(embedding|lm_head)/base$)", (r"^base_model\.model\.", "")
OLD = (r"\.base_layer\.weight$", ".weight")


@pytest.mark.parametrize(
    "changes", [[], [OLD], [BARE], [OLD, BARE], [("^", "module.")], [(r"\.default\.", "."), BARE], [OLD, BARE, ("^", "module.")]]
)
def test_lora_in_every_spelling(tmp_path, changes):
    tensors = lora().state_dict()
    assert "base_model.model.model.layers.1.self_attn.v_proj.base_layer.weight" in tensors
    found = imported(tmp_path / "m", LLM, renamed(tensors, *changes))
    where = "base_model.model.model.layers.1.self_attn.v_proj."
    for ours, key in (("kernel", "base_layer"), ("lora_a", "lora_A.default"), ("lora_b", "lora_B.default")):
        np.testing.assert_array_equal(found[f"llm/layers/block/v/{ours}"][1], tensors[f"{where}{key}.weight"].T)


@pytest.mark.parametrize("safe", [True, False])
def test_an_adapter_as_peft_saves_it(tmp_path, safe):
    if safe:
        lora().save_pretrained(tmp_path / "adapter")
    else:
        (tmp_path / "adapter").mkdir()
        torch.save(peft.get_peft_model_state_dict(lora()), tmp_path / "adapter" / "adapter_model.bin")
    found = imported(tmp_path / "adapter", "/lora_[ab]$")
    assert len(found) == 4
    assert_same(found, imported(tmp_path / "whole", "^llm/.*lora_[ab]$", {k: v for k, v in lora().state_dict().items() if "lora_" in k}))


# --- whole models at full size


@pytest.mark.parametrize("model", ["lisa", "glamm"])
def test_every_published_key_is_mapped_with_its_shape(model):
    config = lisa_7b.get_config()
    config.model.llm.vocab_size = 32002  # [SEG] is the last row of 32003
    extra = published("lisa_mm_projector_example")
    if model == "glamm":
        config.model.aligner.kind, extra = "mlp", published("glamm_extra")
    sam = renamed(published("sam_vit_h"), ("^", "model.grounding_encoder." if model == "glamm" else "model.visual_model."))
    parts = ("llama7b_V32003", "text_hidden_fcs", "lora_r8_qv_peft_le_0.5")
    keys = {key: shape for part in parts for key, shape in published(part).items()} | extra | sam
    spelt = {key: keys[names[0]] for key, names in layouts.normalize_keys(keys).items()}
    kept = {key for key in spelt if re.search(layouts.KEPT, key)}
    assert len(spelt) == len(keys) and kept == {key for key in extra if key.startswith("model.region_encoder.")}
    found = layouts.detect(spelt)
    projector = "projector_mlp" if model == "glamm" else "projector"
    prefix = {"llama": "", "lora": "", "sam": "model.visual_model.", projector: "", "seg": ""}
    assert {part.name: part.prefix for part in found} == prefix

    wanted = {path: leaf for path, leaf in pathtree.flatten(mimo.abstract(config)[1]).items() if not path.startswith("vision/")}
    table = [row for part in found for row in layouts.with_prefix(part.component.rows, part.prefix)]
    shapes = name_map.torch_shapes(wanted, table, name_map.layer_indices(config.model))
    assert shapes == {key: shape for key, shape in spelt.items() if key not in kept}


@pytest.mark.parametrize(
    "key, title, places",
    [
        ("embeddings.class_embedding", "CLIP vision tower, transformers", ["", "vision_model."]),
        ("visual.class_embedding", "CLIP vision tower, open_clip", ["a.", "b."]),
        ("model.embed_tokens.weight", "Llama", ["", "teacher."]),
        ("mask_decoder.iou_token.weight", "SAM", ["", "ema."]),
    ],
)
def test_a_part_that_is_there_twice_is_refused(key, title, places):
    named = ", ".join((place + "visual." if "open" in title else place) or r"\(none\)" for place in places)
    with pytest.raises(UserError, match=f"^the file has {title} 2 times, with prefixes {named}; give the checkpoint of one model$"):
        layouts.detect([place + key for place in places])


def test_a_file_of_something_else_is_refused(tmp_path):
    originals.put_tensors(tmp_path, {f"bert.{i}": torch.zeros(1) for i in range(5)})
    with pytest.raises(SourceError, match=f"--vision {tmp_path}: has no known model among its 5 tensors \\(bert.0, bert.1, bert.2, …\\)"):
        Source("vision", tmp_path, INDICES)
