"""`mimo ask --estimate-memory`: the memory that a checkpoint will need on this machine, computed before any weight is read.

The sizes of parameters come from the checkpoint's manifests, all others from the model's functions, which are compiled for the available
device without their arrays.
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
# Path regex -> name of the group of parameters in the table; the first match counts.
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
    """programs: {purpose: a lowered function of the model}; cache, features: shapes of the KV cache and of one image's features; slots:
    tokens that the cache has room for."""

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
    """Bytes per device for one conversation about one image that fills the whole context.

    config, shapes: of the checkpoint, {path: shape and dtype of every parameter}; quantization: as in `Mimo.load`.
    lower: makes the programs of a conversation from the config and the shapes in which parameters will be stored
    (`mimo_jax.infer.engine.lower_conversation`). Returns

        quantization, devices (their number), device (their kind), unsharded {path: why it is not split over the devices}
        parameters {part: {bytes, dtypes}}, loading (in addition to these while they are quantized; 0 without quantization)
        cache, slots (tokens in the cache), features (of one image), temporaries {function: bytes, with what it returns}
        total (at the peak), available, fits, other {another quantization: its total}"""
    made = {"quantization": quantization, "unsharded": {}}
    made |= {"devices": jax.local_device_count(), "device": jax.local_devices()[0].device_kind}
    stored = _with_shardings(config, _stored_shapes(shapes, config, quantization), made["unsharded"])
    made["parameters"] = parameters(stored)
    asked = lower(config.with_quantization(quantization), pathtree.unflatten(stored), tokenizer)
    made |= {"slots": asked.slots, "temporaries": {name: _temporaries(program) for name, program in asked.programs.items()}}
    made |= {name: sum(map(_on_device, jax.tree.leaves(getattr(asked, name)))) for name in ("cache", "features")}
    asking = made["cache"] + made["features"] + max(made["temporaries"].values())
    # Each matrix is read in its own dtype and then quantized; a CPU briefly holds two copies of what it read.
    wide = [_on_device(leaf) for path, leaf in _with_shardings(config, shapes, {}).items() if re.search(quantize.QUANTIZED, path)]
    loading = max(wide) * (2 if jax.default_backend() == "cpu" else 1)
    made["loading"] = loading if quantization else 0
    made["total"] = sum(part["bytes"] for part in made["parameters"].values()) + max(asking, made["loading"])
    made["available"] = _available()
    made["fits"] = made["total"] <= made["available"]
    others = {w: _with_shardings(config, _stored_shapes(shapes, config, w), {}).values() for w in QUANTIZATIONS if w != quantization}
    made["other"] = {w: sum(map(_on_device, leaves)) + max(asking, loading) for w, leaves in others.items()}
    return made


def parameters(shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, dict]:
    """{part: {"bytes" (per device), "dtypes"}} of the parameters, grouped by PARTS."""
    parts = {name: {"bytes": 0, "dtypes": []} for name in PARTS.values()}
    for path, leaf in shapes.items():
        part = parts[pathtree.first_match(path, PARTS, "memory_estimate.PARTS")]
        part["bytes"] += _on_device(leaf)
        part["dtypes"] = sorted({*part["dtypes"], str(leaf.dtype)})
    return {name: part for name, part in parts.items() if part["bytes"]}


def table(made: dict) -> str:
    """The result of `estimate_memory` as text."""
    rows = [(name, part["bytes"], ", ".join(part["dtypes"])) for name, part in made["parameters"].items()]
    rows += [
        ("parameters, total", sum(part["bytes"] for part in made["parameters"].values()), ""),
        ("KV cache of one conversation", made["cache"], f"{made['slots']} tokens"),
        ("features of one image", made["features"], ""),
        *((f"working memory: {name}", size, "") for name, size in made["temporaries"].items()),
    ]
    if made["quantization"]:
        rows.append((f"while loading into {made['quantization']}", made["loading"], "in addition to the parameters"))
    rows.append(("needed at the peak", made["total"], f"of {_size(made['available'])}"))
    wide = max(len(name) for name, *_ in rows)
    devices = f"on each of {made['devices']} devices" if made["devices"] > 1 else "on one device"
    lines = [f"{devices} ({made['device']}):", *(f"  {name:{wide}}  {_size(size):>9}  {about}".rstrip() for name, size, about in rows)]
    lines += [f"not split over the devices: {reason}" for reason in made["unsharded"].values()]
    if made["fits"]:
        return "\n".join([*lines, "it fits"])
    smaller = [f"--quantize {w} needs {_size(size)}" for w, size in made["other"].items() if size <= made["available"]]
    remedy = "; ".join(smaller) if smaller else "use a device with more memory, or several devices"
    return "\n".join([*lines, f"it does not fit: {remedy}"])


def _size(count: float) -> str:
    return f"{count / GB:.2f} GB" if count >= GB / 10 else f"{count / MB:.2f} MB"


def _stored_shapes(shapes: dict, config: Config, quantization: str) -> dict:
    """{path: shape} of the parameters as they will be stored in memory."""
    config.with_quantization(quantization)
    stored = {}
    for path, leaf in shapes.items():
        stored |= quantize.quantize_param(path, leaf, quantization)
    return stored


def _with_shardings(config: Config, shapes: dict, unsharded: dict) -> dict:
    """The same shapes with the shardings that `load_for_inference` gives them."""
    mesh = sharding.inference_mesh(config.model.llm)
    if mesh is None:
        return shapes
    places = pathtree.flatten(sharding.param_shardings(pathtree.unflatten(shapes), mesh, unsharded))
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path]) for path, leaf in shapes.items()}


def _on_device(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes per device."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return int(np.prod(shape)) * leaf.dtype.itemsize


def _temporaries(lowered: jax.stages.Lowered) -> int:
    """Bytes that a call needs in addition to its arguments."""
    memory = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def _available() -> int:
    """Free bytes per device; on a CPU, the free memory of the machine divided by the number of its virtual devices."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 // jax.local_device_count()
