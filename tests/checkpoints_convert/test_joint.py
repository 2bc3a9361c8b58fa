"""Whole models in PyTorch, converted by the command, against what they compute: text logits, greedy tokens and masks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints_convert import rows
from mimo_jax.cli import main
from mimo_jax.data import conversation
from mimo_jax.data.prompts import Prompts, encode_prompts
from mimo_jax.data.transforms import logits_to_image, preprocess
from mimo_jax.geometry import sam_frame, vision_frame
from mimo_jax.infer.predictor import Mimo
from mimo_jax.model_config import LoraConfig
from mimo_jax.models import mimo, scan
from tests.checkpoints_convert import originals
from tests.checkpoints_convert.torch_models import LisaOracle, MimoOracle
from tests.models.oracles import relative_l2

NEW_TOKENS = 10
QUESTION = "Where is the liver?"


def picture(height: int = 50, width: int = 70) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (height, width, 3)).astype(np.uint8)


def convert(folder: Path, config, *flags: str) -> Path:
    out = folder / "import"
    assert main.main(["convert", "import", "--config", originals.config_file(folder, config), *map(str, flags), "--out", str(out)]) == 0
    return out


def say_seg(oracle, seg_id: int) -> None:
    """Make <SEG> likely, so that greedy answers hold one."""
    with torch.no_grad():
        oracle.llama.lm_head.weight[seg_id] *= 3


def ours(model: Mimo, image: np.ndarray, question: str, answer: list[int], prompts: Prompts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits [T, V], float masks [n, H, W], ids of the prompt) of our model, teacher-forced on an answer."""
    config, m = model.config, model.config.model
    height, width = image.shape[:2]
    ids, query_index = conversation.encode_user_turn(model.tokenizer, config, question, 0, True)
    said = np.array(ids + answer, np.int32)
    instruction = conversation.instruction_ids(model.tokenizer, config, question)
    xy, kind = encode_prompts(prompts, vision_frame(height, width, m.vision.image_size, m.vision.image_fit), m.prompt)
    seen = {name: value[None] for name, value in preprocess(image, m).items()}
    seg = [len(ids) + i for i, token in enumerate(answer) if token == model.tokenizer.seg]
    batch = {
        **seen,
        "input_ids": said[None],
        "query_index": np.array(query_index + [-1] * len(answer), np.int32)[None],
        "instruction_ids": np.pad(np.array(instruction, np.int32), (0, m.aligner.max_text - len(instruction)))[None, None],
        "instruction_mask": (np.arange(m.aligner.max_text) < len(instruction))[None, None],
        "prompt_xy": xy[None, None],
        "prompt_kind": kind[None, None],
        "seg_index": np.array(seg, np.int32)[None],
    }
    graphdef, _ = mimo.abstract(config)
    module = scan.bind(graphdef, model.engine.params)
    out = module(batch)
    logits = np.asarray(module.logits(out["hidden"]))[0]
    frame = sam_frame(height, width, m.sam.image_size)
    masks = np.stack([logits_to_image(np.asarray(mask), frame, height, width) for mask in out["masks"][0]])
    return logits, masks, np.array(ids)


def assert_same(oracle, model: Mimo, image, prompt, order, prompts: Prompts = Prompts(), boxes=()) -> None:  # noqa: B008
    """Logits to 1e-5, the greedy answer, and the masks of it. prompt: the oracle's arguments; order: its row of each id here."""
    seg = int(order[model.tokenizer.seg])
    greedy = oracle.greedy(image, *prompt, new_tokens=NEW_TOKENS, eos_id=int(order[model.tokenizer.eos]))
    assert seg in greedy, "the oracle says no <SEG>: this test shows nothing about masks"
    here = np.argsort(order)[greedy].tolist()
    generated = model.open(image).ask(QUESTION, boxes=boxes, max_new_tokens=NEW_TOKENS)
    logits, masks, ids = ours(model, image, QUESTION, here, prompts)
    wanted = oracle.logits(image, *prompt)[0].numpy()
    assert relative_l2(logits[: len(wanted)], wanted[:, order]) <= 1e-5
    text, _, phrases = conversation.parse_ids(model.tokenizer, here)
    assert generated.text == text and len(generated.entities) == len(phrases) == greedy.count(seg)
    wanted = oracle.masks(image, *prompt, answer_ids=greedy, seg_id=seg).numpy()
    assert relative_l2(masks, wanted) <= 1e-5
    for entity, float_mask in zip(generated.entities, wanted, strict=True):
        clear = np.abs(float_mask) > 1e-4
        assert np.array_equal(entity.mask[clear], (float_mask > 0)[clear])


# --- LISA and GLaMM


def lisa_folder(folder: Path, oracle: LisaOracle, added: dict[str, int], **options) -> Path:
    originals.put_tensors(folder / "lisa", oracle.state_dict(**options), shards=2)
    originals.put_tokenizer(folder / "lisa", added)
    oracle.llama_config.save_pretrained(folder / "lisa")
    oracle.vision.save_pretrained(folder / "clip")
    return folder / "lisa"


def lisa_order(rows: int, seg: int) -> np.ndarray:
    """The row there of each id here: <SEG> comes last."""
    return np.array([row for row in range(rows) if row != seg] + [seg])


# As training code adds them: [SEG] first, the image's tokens after it, so that rows move.
LISA_ADDED = {"[SEG]": originals.PIECES, "<im_start>": originals.PIECES + 1, "<im_end>": originals.PIECES + 2}


@pytest.mark.parametrize("tower", ["apart", "inside"])
def test_lisa(tmp_path, tower):
    config = originals.lisa_config(lora=LoraConfig(rank=0))
    config.model.llm.vocab_size = originals.PIECES + 2
    rows_there = originals.PIECES + 3
    oracle = LisaOracle(config, rows_there)
    say_seg(oracle, originals.PIECES)
    folder = lisa_folder(tmp_path, oracle, LISA_ADDED, vision_tower=tower == "inside")
    clip = ["--vision", tmp_path / "clip"] if tower == "apart" else []
    model = Mimo.load(convert(tmp_path / "made", config, "--joint", folder, *clip))

    order = lisa_order(rows_there, originals.PIECES)
    ids, query_index = conversation.encode_user_turn(model.tokenizer, model.config, QUESTION, 0, True)
    at = [i for i, query in enumerate(query_index) if query >= 0]
    before, after = order[ids[: at[0]]].tolist(), order[ids[at[-1] + 1 :]].tolist()
    assert before[-1] == LISA_ADDED["<im_start>"] and after[0] == LISA_ADDED["<im_end>"]
    assert_same(oracle, model, picture(), (before, after), order)


def test_glamm_with_its_region_encoder(tmp_path):
    config = originals.lisa_config(lora=LoraConfig(rank=0), seg_position="after")
    config.model.aligner.kind = "mlp"
    added = {"[SEG]": 420, "<im_start>": 421, "<p>": 422, "</p>": 423, "<bbox>": 424, "<im_end>": 425}
    config.model.llm.vocab_size = originals.PIECES + 3
    oracle = LisaOracle(config, originals.PIECES + 6, glamm=True)
    say_seg(oracle, 420)
    folder = lisa_folder(tmp_path, oracle, added)
    out = convert(tmp_path / "made", config, "--joint", folder, "--vision", tmp_path / "clip")
    assert (out / "kept.safetensors").is_file()
    model = Mimo.load(out)
    order = np.array([*range(420), 421, 424, 425, 422, 423, 420])
    ids, query_index = conversation.encode_user_turn(model.tokenizer, model.config, QUESTION, 0, True)
    at = [i for i, query in enumerate(query_index) if query >= 0]
    assert_same(oracle, model, picture(40, 90), (order[ids[: at[0]]].tolist(), order[ids[at[-1] + 1 :]].tolist()), order)


# --- MIMO


def theirs(oracle: MimoOracle) -> tuple[dict, list]:
    """The checkpoint with other names for MIMO's own parts, and the key map that says so."""
    renamed = {key.replace(".aligner.", ".mmia.").replace("visual_prompt", "vpe"): value for key, value in oracle.state_dict().items()}
    table = [*rows.ALIGNER, *rows.PROMPT]
    return renamed, [[row.key.replace(".aligner.", ".mmia.").replace("visual_prompt", "vpe"), row.path, row.op] for row in table]


@pytest.mark.parametrize("names", ["ours", "theirs"])
def test_mimo_with_lora_and_prompts(tmp_path, names):
    config = originals.mimo_config()
    oracle = MimoOracle(config)
    say_seg(oracle, originals.PIECES + 2)
    tensors, flags = oracle.state_dict(vision_tower=True), []
    if names == "theirs":
        tensors, table = theirs(oracle)
        oracle.vision.save_pretrained(tmp_path / "clip")
        (tmp_path / "rows.json").write_text(json.dumps(table))
        flags = ["--key-map", tmp_path / "rows.json", "--vision", tmp_path / "clip"]
    originals.put_tensors(tmp_path / "mimo", tensors)
    originals.put_tokenizer(tmp_path / "mimo", {"<p>": 420, "</p>": 421, "<SEG>": 422})
    model = Mimo.load(convert(tmp_path / "made", config, "--joint", tmp_path / "mimo", "--lora-alpha", "8", *flags))

    image, boxes = picture(), [[10, 5, 40, 30]]
    prompts = Prompts(boxes=np.array(boxes, float))
    frame = vision_frame(*image.shape[:2], config.model.vision.image_size, config.model.vision.image_fit)
    xy, kind = encode_prompts(prompts, frame, config.model.prompt)
    ids, query_index = conversation.encode_user_turn(model.tokenizer, model.config, QUESTION, 0, True)
    instruction = conversation.instruction_ids(model.tokenizer, model.config, QUESTION)
    assert_same(oracle, model, image, (instruction, xy, kind, ids, query_index), np.arange(423), prompts, boxes)
