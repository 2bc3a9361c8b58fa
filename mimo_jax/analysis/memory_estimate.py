"""`mimo ask --estimate-memory`: what memory a checkpoint will take on this machine, told before any weight is read.

Parameters come from the checkpoint's manifests, all else from the functions of the model themselves, compiled for the device at
hand without their arrays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mimo_jax import pathtree, quantize, sharding
from mimo_jax.checkpoints import checkpoint as checkpoints
from mimo_jax.checkpoints import loading
from mimo_jax.config import QUANTIZATIONS, Config
from mimo_jax.data.tokenizer import Tokenizer, load_tokenizer

GB, MB = 10**9, 10**6
# What the table calls each group of parameters: the first row that matches.
PARTS = {
    r"/lora_[ab]$": "LoRA",
    r"^llm/": "language model",
    r"^(embedding|lm_head)/": "embedding and head",
    r"^vision/": "vision tower",
    r"^sam_encoder/": "SAM image encoder",
    r"^(sam_decoder|sam_prompt|seg_projection)/": "mask decoder",
    r"^(aligner|prompt)/": "aligner and prompts",
}


class LoweredConversation(NamedTuple):
    """programs: {what it does: a function of the model, lowered}; the shapes of the KV cache, its tokens, and of one image's features."""

    programs: dict[str, jax.stages.Lowered]
    cache: Any
    slots: int
    features: Any


Lower = Callable[[Config, dict, Tokenizer], LoweredConversation]


def estimate_checkpoint_memory(path: str | os.PathLike, lower: Lower, quantization: str = "") -> dict:
    """`estimate_memory` of a checkpoint; UserError for what is not one."""
    config, shapes = loading.read_shapes(path)
    return estimate_memory(config, shapes, load_tokenizer(checkpoints.tokenizer_path(path), config.model), lower, quantization)


def estimate_memory(
    config: Config, shapes: dict[str, jax.ShapeDtypeStruct], tokenizer: Tokenizer, lower: Lower, quantization: str = ""
) -> dict:
    """Bytes that one conversation about one image takes on each device, with the whole context in use.

    config, shapes: of the checkpoint, {path: shape and dtype of every parameter}; quantization: as of `Mimo.load`.
    lower: makes the programs of a conversation from the config and the shapes as they will be held
    (`mimo_jax.infer.engine.lower_conversation`). Returns

        quantization, devices (their number), device (what they are), unsharded {path: why it is not split over the devices}
        parameters {part: {bytes, dtypes}}, loading (beside these, while they are read; 0 where they stay as they are)
        cache, slots (its tokens), features (of one image), temporaries {function: bytes, what it returns included}
        total (at the worst moment), available, fits, other {quantization: total of those}"""
    made = {"quantization": quantization, "unsharded": {}}
    made |= {"devices": jax.local_device_count(), "device": jax.local_devices()[0].device_kind}
    held = _placed(config, _held(shapes, config, quantization), made["unsharded"])
    made["parameters"] = parameters(held)
    asked = lower(config.with_quantization(quantization), pathtree.unflatten(held), tokenizer)
    made |= {"slots": asked.slots, "temporaries": {name: _temporaries(program) for name, program in asked.programs.items()}}
    made |= {name: sum(map(_on_device, jax.tree.leaves(getattr(asked, name)))) for name in ("cache", "features")}
    asking = made["cache"] + made["features"] + max(made["temporaries"].values())
    # Each matrix is read as it is, and made into integers then; a CPU holds what it read twice for a moment.
    wide = [_on_device(leaf) for path, leaf in _placed(config, shapes, {}).items() if re.search(quantize.QUANTIZED, path)]
    loading = max(wide) * (2 if jax.default_backend() == "cpu" else 1)
    made["loading"] = loading if quantization else 0
    made["total"] = sum(part["bytes"] for part in made["parameters"].values()) + max(asking, made["loading"])
    made["available"] = _available()
    made["fits"] = made["total"] <= made["available"]
    others = {w: _placed(config, _held(shapes, config, w), {}).values() for w in QUANTIZATIONS if w != quantization}
    made["other"] = {w: sum(map(_on_device, leaves)) + max(asking, loading) for w, leaves in others.items()}
    return made


def parameters(shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, dict]:
    """{part: {"bytes" (on one device), "dtypes"}} of parameters by their path."""
    parts = {name: {"bytes": 0, "dtypes": []} for name in PARTS.values()}
    for path, leaf in shapes.items():
        part = parts[pathtree.first_match(path, PARTS, "memory_estimate.PARTS")]
        part["bytes"] += _on_device(leaf)
        part["dtypes"] = sorted({*part["dtypes"], str(leaf.dtype)})
    return {name: part for name, part in parts.items() if part["bytes"]}


def table(made: dict) -> str:
    """What `estimate_memory` found, for reading."""
    rows = [(name, part["bytes"], ", ".join(part["dtypes"])) for name, part in made["parameters"].items()]
    rows += [
        ("parameters, in all", sum(part["bytes"] for part in made["parameters"].values()), ""),
        ("KV cache of one conversation", made["cache"], f"{made['slots']} tokens"),
        ("features of one image", made["features"], ""),
        *((f"working memory: {name}", size, "") for name, size in made["temporaries"].items()),
    ]
    if made["quantization"]:
        rows.append((f"while loading into {made['quantization']}", made["loading"], "beside the parameters"))
    rows.append(("needed at once", made["total"], f"of {_size(made['available'])}"))
    wide = max(len(name) for name, *_ in rows)
    devices = f"on each of {made['devices']} devices" if made["devices"] > 1 else "on one device"
    lines = [f"{devices} ({made['device']}):", *(f"  {name:{wide}}  {_size(size):>9}  {about}".rstrip() for name, size, about in rows)]
    lines += [f"not split over the devices: {reason}" for reason in made["unsharded"].values()]
    if made["fits"]:
        return "\n".join([*lines, "it fits"])
    smaller = [f"--quantize {w} takes {_size(size)}" for w, size in made["other"].items() if size <= made["available"]]
    remedy = "; ".join(smaller) if smaller else "take a device with more memory, or several"
    return "\n".join([*lines, f"it does not fit: {remedy}"])


def _size(count: float) -> str:
    return f"{count / GB:.2f} GB" if count >= GB / 10 else f"{count / MB:.2f} MB"


def _held(shapes: dict, config: Config, quantization: str) -> dict:
    """{path: shape} of the parameters as they will be held."""
    config.with_quantization(quantization)
    held = {}
    for path, leaf in shapes.items():
        held |= quantize.quantize_param(path, leaf, quantization)
    return held


def _placed(config: Config, shapes: dict, unsharded: dict) -> dict:
    """The same shapes where `load_for_inference` puts them."""
    mesh = sharding.inference_mesh(config.model.llm)
    if mesh is None:
        return shapes
    places = pathtree.flatten(sharding.param_shardings(pathtree.unflatten(shapes), mesh, unsharded))
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path]) for path, leaf in shapes.items()}


def _on_device(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes on one device."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return int(np.prod(shape)) * leaf.dtype.itemsize


def _temporaries(lowered: jax.stages.Lowered) -> int:
    """Bytes that a call takes beside its arguments."""
    memory = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def _available() -> int:
    """Bytes free on one device; on a CPU, free on the machine, shared by those that pretend to be several."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 // jax.local_device_count()
