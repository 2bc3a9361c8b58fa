"""`mimo convert export`: a mimo_jax checkpoint in the layouts of transformers, peft, segment-anything and LISA, or as one directory.

    hf      OUT/vision (of a CLIP) and OUT/llm, which `from_pretrained` loads; LoRA merged into llm/, or not at all with merge=False
    peft    OUT, an adapter of llm/
    sam     OUT/sam_vit_h.pth, which segment-anything loads, and OUT/mimo_config.json, which tells the pixels that it expects
    joint   OUT, one model in LISA's layout, which `mimo convert import --joint` reads
    mimo    OUT, the checkpoint with its frozen base

Parameters are read one by one, so that a checkpoint may be larger than memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from checkpoints_convert import name_map, ops, rows
from checkpoints_convert.batch_norm import unfolded
from checkpoints_convert.layouts import COMPONENTS, with_prefix
from checkpoints_convert.rows import Row
from checkpoints_convert.sources import SourceError
from checkpoints_convert.staging import check_output_folder
from mimo_jax import files
from mimo_jax.checkpoints import checkpoint, frozen_params, provenance
from mimo_jax.checkpoints.arrays import CheckpointError
from mimo_jax.checkpoints.loading import LazyParams
from mimo_jax.config import Config
from mimo_jax.data.tokenizer import load_tokenizer
from mimo_jax.models import registry, standard_parts  # noqa: F401
from mimo_jax.models.lora import merge_lora

_LANGUAGE = ("llm/", "embedding/", "lm_head/")
_SHARD_BYTES = 2 * 10**9
_SAM_NAMES = {768: "b", 1024: "l", 1280: "h"}
# Prefixes of the keys of components in LISA's layout; the rows of other components have the whole key.
_JOINT_PREFIXES = {"clip": "model.vision_tower.vision_tower.vision_model.", **dict.fromkeys(("sam", "tiny_vit"), "model.visual_model.")}


def export_checkpoint(
    path: str | os.PathLike, format: str, out: Path, base_path: str | os.PathLike | None = None, merge: bool = True, dtype: str = ""
) -> list[str]:
    """Write a checkpoint in another format; returns lines that list the files. Raises UserError if the checkpoint or the target
    cannot be used; then nothing is written. merge: fold LoRA into the language model (hf, joint). dtype: of every tensor of a
    language model with LoRA merged; empty: as they are stored."""
    out = files.absolute(out)
    check_output_folder(out)
    leaves = LazyParams(path, base_path)
    if format == "peft" and not leaves.config.model.lora.rank:
        raise SourceError(f"{path}: has no LoRA to export (config.model.lora.rank is 0)")
    _check_format(leaves, format)
    if dtype and (format not in ("hf", "joint") or not merge):
        raise SourceError("--dtype: is for --format hf and joint with --lora merged; leave it out")
    rounding = _Rounding(jnp.dtype(dtype) if dtype else None)
    if format not in ("peft", "sam"):
        check_output_folder(out, sum(leaf.size * rounding.dtype_of(key, leaf).itemsize for key, leaf in leaves.shapes.items()))
    with files.disk_errors(out, CheckpointError), files.atomic_folder(out) as stage:
        _WRITERS[format](leaves, stage, rounding if merge else None)
        written = sorted(file.relative_to(stage) for file in stage.rglob("*") if file.is_file())
        size = sum((stage / file).stat().st_size for file in written)
    shown = [str(out / file) for file in written if file.suffix in (".safetensors", ".pth", ".json") and "steps" not in file.parts]
    return [
        *shown[:12],
        *rounding.lines(),
        f"{format}: {size / 1e6:,.1f} MB in {len(written)} files under {out}, from step {leaves.step} of {leaves.run}",
    ]


def _check_format(leaves: LazyParams, format: str) -> None:
    """Raise SourceError for a format that has no layout for one of the model's kinds."""
    published = {"hf": (("vision", "clip"), ("llm", "llama")), "peft": (("llm", "llama"),), "joint": (), "sam": (), "mimo": ()}[format]
    needed = {"sam": ("sam",), "joint": ("vision", "aligner", "llm", "sam")}.get(format, ())
    names = {section: registry.part(leaves.config.model, section).component for section in registry.TABLES}
    if leaves.config.model.vision.from_sam():
        names["vision"] = "clip"  # it has no tensors that a format would need a place for
    wrong = [section for section, name in published if names[section] != name] + [section for section in needed if not names[section]]
    for section in wrong:
        kind = getattr(leaves.config.model, section).kind
        raise SourceError(f"--format {format}: has no layout for config.model.{section}.kind {kind}; export with --format mimo")


def _table(leaves: LazyParams, section: str) -> tuple[str, tuple[Row, ...]]:
    """(name of the component, its rows) of a part of the model."""
    name = registry.part(leaves.config.model, section).component
    return name, COMPONENTS[name].rows


# --- the formats


def _write_hf(leaves: LazyParams, out: Path, merge: _Rounding | None) -> None:
    if not leaves.config.model.vision.from_sam():
        _write_clip(leaves, out / "vision")
    _write_llm(leaves, out / "llm", _llm_tensors(leaves, merge))


def _write_clip(leaves: LazyParams, out: Path) -> None:
    import transformers

    m = leaves.config.model.vision
    save_shards(_tensors(leaves, rows.CLIP, "vision/"), out)
    transformers.CLIPVisionConfig(
        hidden_size=m.width, num_hidden_layers=m.layers, num_attention_heads=m.heads, intermediate_size=m.mlp_width,
        hidden_act=m.activation, layer_norm_eps=m.eps, image_size=m.image_size, patch_size=m.patch_size,
        architectures=["CLIPVisionModel"],
    ).save_pretrained(out)  # fmt: skip


def _write_llm(leaves: LazyParams, out: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    import transformers

    m = leaves.config.model.llm
    save_shards(tensors, out)
    _write_tokenizer(leaves, out)
    if _table(leaves, "llm")[0] != "llama":  # the settings of other kinds are in mimo_config.json
        return
    transformers.LlamaConfig(
        vocab_size=m.vocab_size + len(leaves.config.model.grounding_tokens()), hidden_size=m.width, num_hidden_layers=m.layers,
        num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, intermediate_size=m.mlp_width, rms_norm_eps=m.eps,
        rope_theta=m.rope_theta, max_position_embeddings=m.max_length, tie_word_embeddings=False, pad_token_id=0,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(out)  # fmt: skip


def _write_peft(leaves: LazyParams, out: Path, merge: _Rounding | None) -> None:
    tensors = {f"base_model.model.{key}": value for key, value in _tensors(leaves, rows.LORA, "llm/", r"lora")}
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, out / "adapter_model.safetensors", {"format": "pt"})
    _write_adapter_config(leaves.config, out)


def _write_adapter_config(config: Config, out: Path) -> None:
    import peft

    targets = [f"{name}_proj" for name in config.lora_targets()]
    lora = config.model.lora
    peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, bias="none", task_type="CAUSAL_LM").save_pretrained(out)


def _write_sam(leaves: LazyParams, out: Path, merge: _Rounding | None) -> None:
    import torch

    def tensor(array: np.ndarray) -> torch.Tensor:
        array = np.array(array)
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype == jnp.bfloat16 else torch.from_numpy(array)

    sam = leaves.config.model.sam
    component, table = _table(leaves, "sam")
    tensors = {key: tensor(value) for key, value in _tensors(leaves, table, "sam_")}
    size = _SAM_NAMES.get(sam.width, str(sam.width)) if component == "sam" else ""
    torch.save(tensors, out / f"sam_{'_'.join(filter(None, (sam.kind, size)))}.pth")
    files.write_json(out / "mimo_config.json", leaves.config.to_dict())  # the pixels that it expects


def _write_joint(leaves: LazyParams, out: Path, merge: _Rounding | None) -> None:
    separate_lora = bool(leaves.config.model.lora.rank) and merge is None

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield from _llm_tensors(leaves, merge)
        if separate_lora:
            for key, value in _tensors(leaves, rows.LORA, "llm/", r"lora"):
                yield key.replace("lora_A.weight", "lora_A.default.weight").replace("lora_B.weight", "lora_B.default.weight"), value
        aligner = _table(leaves, "aligner")[1]
        for table, root in ((aligner, "aligner/"), (rows.PROMPT, "prompt/"), (rows.SEG_PROJECTION, "seg_projection/")):
            yield from _tensors(leaves, table, root)
        encoders = {"sam": "sam_", "vision": "vision/"}
        if leaves.config.model.vision.from_sam():
            del encoders["vision"]
        for section, root in encoders.items():
            name, table = _table(leaves, section)
            yield from _tensors(leaves, with_prefix(table, _JOINT_PREFIXES.get(name, "")), root)
        if (leaves.run / provenance.KEPT).is_file():
            yield from load_file(leaves.run / provenance.KEPT).items()

    _write_llm(leaves, out, tensors())
    files.write_json(out / "mimo_config.json", leaves.config.to_dict())
    if separate_lora:
        _write_adapter_config(leaves.config, out)


def _write_mimo(leaves: LazyParams, out: Path, merge: _Rounding | None) -> None:
    final = out.parents[1] / out.name  # see `files.atomic_folder`
    frozen_params.write(out, ((path, leaves[path]) for path in leaves if path not in leaves.trained), final)
    checkpoint.write_step(out, leaves.step, ((path, leaves[path]) for path in sorted(leaves.trained)), {})
    for name in ("config.json", "tokenizer.json", provenance.FILE, provenance.KEPT):
        if (leaves.run / name).is_file():
            shutil.copy(leaves.run / name, out / name)
    for name in (checkpoint.CALIBRATION, checkpoint.FAMILIARITY):
        if (fitted := leaves.run / "steps" / str(leaves.step) / name).is_file():
            shutil.copy(fitted, out / "steps" / str(leaves.step) / name)


_WRITERS = {"hf": _write_hf, "peft": _write_peft, "sam": _write_sam, "joint": _write_joint, "mimo": _write_mimo}


# --- tensors


def _tensors(leaves: Mapping[str, np.ndarray], table, root: str, containing: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Torch tensors of the parameters whose path begins with `root` and contains `containing`."""
    shapes = {path: shape for path, shape in leaves.shapes.items() if path.startswith(root) and containing in path}
    yield from unfolded(name_map.export_tensors(leaves, table, name_map.layer_indices(leaves.config.model), shapes))


def _llm_tensors(leaves: LazyParams, merge: _Rounding | None) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the language model with its whole vocabulary, whose rows are in the original's order."""
    own = _Language(leaves, merge)
    order = _order(leaves)
    for key, value in name_map.export_tensors(own, _table(leaves, "llm")[1], name_map.layer_indices(leaves.config.model), own.shapes):
        if key in (rows.EMBEDDING_KEY, rows.HEAD_KEY):
            moved = np.empty_like(value)
            moved[order] = value
            value = moved
        yield key, value


def _rounded(path: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Raises SourceError for a value beyond the range of `dtype`."""
    with np.errstate(over="ignore"):
        rounded = value.astype(dtype)
    if (np.isfinite(value) & ~np.isfinite(rounded)).any():
        raise SourceError(f"--dtype {dtype}: {path} has values beyond its range; use bfloat16 or float32")
    return rounded


class _Rounding:
    """The dtype of a merged language model, and how much of LoRA's update it loses, in squared norms. Updates below half a unit in the
    last place of a bfloat16 weight, 1/512 of its size, vanish, and others are rounded."""

    def __init__(self, dtype: np.dtype | None = None):
        """dtype: of every parameter; None: that in which each is stored."""
        self.dtype = dtype
        self.update = self.lost = 0.0

    def dtype_of(self, path: str, leaf: Any) -> np.dtype:
        """The dtype in which the parameter at `path` is exported."""
        return np.dtype(self.dtype if self.dtype is not None and path.startswith(_LANGUAGE) else leaf.dtype)

    def add(self, before: np.ndarray, exact: np.ndarray, merged: np.ndarray) -> None:
        self.update += float(np.square(exact - before.astype(np.float32)).sum())
        self.lost += float(np.square(exact - merged.astype(np.float32)).sum())

    def lines(self) -> list[str]:
        if not self.lost or not self.update:
            return []
        share = (self.lost / self.update) ** 0.5
        remedy = "--dtype float32 loses less, --lora apart nothing"
        return [f"LoRA was merged in fp32 and rounded: an error of {share:.1%} of its update (relative L2); {remedy}"]


class _Language(Mapping[str, np.ndarray]):
    """The language model's parameters without LoRA, which is folded into the kernels if `merge`."""

    def __init__(self, leaves: LazyParams, merge: _Rounding | None):
        self._leaves, self._merge = leaves, merge
        self.shapes = {p: s for p, s in leaves.shapes.items() if p.startswith(_LANGUAGE) and not p.endswith(("/lora_a", "/lora_b"))}

    def __getitem__(self, path: str) -> np.ndarray:
        value, parts = self._leaves[path], {name: path.replace("/kernel", f"/{name}") for name in ("lora_a", "lora_b")}
        if self._merge is None:
            return value
        dtype = self._merge.dtype_of(path, value)
        if not path.endswith("/kernel") or parts["lora_a"] not in self._leaves:
            return value if value.dtype == dtype else _rounded(path, value.astype(np.float32), dtype)
        lora = {name: self._leaves[part] for name, part in parts.items()}
        merged = np.empty(value.shape, dtype)
        for layer in range(len(value)):  # layer by layer, because the sum is in float32
            flat = {"w/kernel": jnp.asarray(value[layer], jnp.float32)} | {f"w/{name}": jnp.asarray(p[layer]) for name, p in lora.items()}
            exact = np.asarray(merge_lora(flat, self._leaves.config.model.lora.alpha)["w/kernel"])
            merged[layer] = _rounded(path, exact, dtype)
            self._merge.add(value[layer], exact, merged[layer])
        return merged

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _grounding(leaves: LazyParams) -> list[list[Any]]:
    """[name, row] of the grounding tokens in the exported vocabulary: where the import found them, else after the base."""
    found = provenance.read(leaves.run).get("grounding")
    tokens, size = leaves.config.model.grounding_tokens(), leaves.config.model.llm.vocab_size
    return found or [[token, size + i] for i, token in enumerate(tokens)]


def _order(leaves: LazyParams) -> np.ndarray:
    """The row in the exported vocabulary of each id of this project."""
    last = [row for _, row in _grounding(leaves)]
    count = leaves.config.model.llm.vocab_size + len(last)
    return np.array([row for row in range(count) if row not in last] + last)


def _write_tokenizer(leaves: LazyParams, out: Path) -> None:
    """Write tokenizer.json with the exported ids, and the tokenizer_config.json that transformers needs."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    values = json.loads(checkpoint.tokenizer_path(leaves.run).read_text())
    order, names = _order(leaves), dict(zip(leaves.config.model.grounding_tokens(), (name for name, _ in _grounding(leaves)), strict=True))
    values["model"]["vocab"] = {token: int(order[i]) for token, i in values["model"]["vocab"].items()}
    for token in values["added_tokens"]:
        token |= {"id": int(order[token["id"]]), "content": names.get(token["content"], token["content"])}
    values["added_tokens"].sort(key=lambda token: token["id"])
    backend = Tokenizer.from_str(json.dumps(values))
    read = load_tokenizer(checkpoint.tokenizer_path(leaves.run), leaves.config.model)
    word = {i: token for token, i in read.control.items()}
    if read.bos is not None:
        bos = word[read.bos]
        here = backend.token_to_id(bos)
        backend.post_processor = TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, here)])
    backend.save(str(out / "tokenizer.json"))
    ids = {"bos_token": read.bos, "eos_token": read.eos, "unk_token": read.control.get("<unk>"), "pad_token": read.pad}
    special = {name: word[i] for name, i in ids.items() if i in word}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": leaves.config.model.llm.max_length}
    files.write_json(out / "tokenizer_config.json", about | special)


def save_shards(tensors: Iterable[tuple[str, np.ndarray]], out: Path) -> None:
    """Write model.safetensors, or shards of it with an index; one shard is in memory at a time."""
    out.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    buffered: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        save_file(buffered, out / f"{len(shards)}.part", {"format": "pt"})
        shards.append(list(buffered))
        buffered.clear()

    for key, value in tensors:
        copied = np.empty(value.shape, value.dtype)
        ops.copy(copied, value)
        total += copied.nbytes
        if buffered and sum(array.nbytes for array in buffered.values()) + copied.nbytes > _SHARD_BYTES:
            flush()
        buffered[key] = copied
    flush()
    if len(shards) == 1:
        os.rename(out / "0.part", out / "model.safetensors")
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        os.rename(out / f"{i}.part", out / name)
    homes = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    files.write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": homes})
