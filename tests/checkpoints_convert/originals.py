"""Small checkpoints on disk as their makers would have left them: folders of LISA, MIMO, Vicuna, CLIP, SAM and LoRA, with random
weights and a sentencepiece tokenizer that is trained here."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file

from configs import lisa_7b, mimo_7b
from mimo_jax.config import Config
from mimo_jax.model_config import LoraConfig
from tests.checkpoints_convert import torch_models
from tests.models.oracles import randomised
from tests.tiny_config import tiny_config

PIECES = 420  # of the sentencepiece model
_CORPUS = """The left lung and the right lung are outlined.
Where is the liver? Segment the spleen. What is this structure?
A chat between a curious human and an artificial intelligence assistant.
The assistant gives helpful, detailed, and polite answers to the human's questions.
USER: ASSISTANT: It is the heart. There are 2 kidneys in 1024 x 768 pixels.
No: nothing is marked here; the dose is 3.5 mg/kg (iv).""".split("\n")


@functools.cache
def sentencepiece_model() -> bytes:
    """A tokenizer.model of Llama's kind: BPE with byte fallback, no normalisation."""
    folder = Path(tempfile.mkdtemp())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_CORPUS * 20), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=PIECES,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
            split_digits=True, allow_whitespace_only_pieces=True, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        return (folder / "tokenizer.model").read_bytes()
    finally:
        shutil.rmtree(folder)


def put_tokenizer(folder: Path, added: dict[str, int] | None = None) -> None:
    """tokenizer.model, and added_tokens.json with tokens that training code put behind it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added))


def put_tensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Safetensors, whole or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    homes = {key: names[i % shards] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key, home in homes.items() if home == name}, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))


def put_three(folder: Path, config: Config, dtype: torch.dtype = torch.float32) -> dict[str, Path]:
    """CLIP and Vicuna as transformers saves them, SAM as facebook did: {"vision", "llm", "sam": path}."""
    paths = {"vision": folder / "vision", "llm": folder / "llm", "sam": folder / "sam_vit_b_01ec64.pth"}
    m = config.model
    randomised(torch_models.clip_model(m.vision), 1).to(dtype).save_pretrained(paths["vision"])
    randomised(torch_models.llama_model(m.llm, PIECES), 2).to(dtype).save_pretrained(paths["llm"])
    put_tokenizer(paths["llm"])
    torch.save(randomised(torch_models.sam_model(m.sam), 3).to(dtype).state_dict(), paths["sam"])
    return paths


def flags_of(paths: dict[str, Path]) -> list[str]:
    return [word for name, path in paths.items() for word in (f"--{name}", str(path))]


def config_file(folder: Path, config: Config) -> str:
    """A config file that gives this config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    path = folder / "config.py"
    path.write_text(
        "import json\nfrom pathlib import Path\nfrom mimo_jax.config import Config\n\n"
        "def get_config():\n    return Config.from_dict(json.loads((Path(__file__).parent / 'config.json').read_text()))\n"
    )
    return str(path)


def mimo_config(**model) -> Config:
    """A tiny MIMO whose vocabulary is that of `sentencepiece_model`, frozen and trained as the paper's."""
    config = tiny_config(**({"lora": LoraConfig(rank=4, alpha=8.0)} | model))
    config.trainables = dict(mimo_7b.TRAINABLES)
    config.model.llm.vocab_size = PIECES
    config.tokenizer = ""
    return config


def lisa_config(**model) -> Config:
    """A tiny model of LISA's layout."""
    like = lisa_7b.get_config()
    fields = {name: getattr(like.model, name) for name in ("seg_state", "seg_position")}
    config = mimo_config(**(fields | model))
    config.trainables = dict(lisa_7b.TRAINABLES)
    config.model.aligner = like.model.aligner
    config.model.aligner.queries = config.model.vision.tokens()
    for name in ("activation", "feature_layer", "image_fit", "resample"):
        setattr(config.model.vision, name, getattr(like.model.vision, name))
    config.data.system_prompt, config.data.image_tokens = like.data.system_prompt, like.data.image_tokens
    config.data.chat_template = like.data.chat_template
    config.data.buckets = "192"
    return config
