"""`mimo convert inspect`: identifies a file or folder of weights, and compares it with a config."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert import hf_config_check, name_map, rows
from checkpoints_convert.hf_config_check import SettingsError
from checkpoints_convert.sources import Source, read_key_map
from checkpoints_convert.vocabulary import Vocabulary
from mimo_jax import pathtree
from mimo_jax.checkpoints import checkpoint, frozen_params, loading, provenance
from mimo_jax.config import Config
from mimo_jax.models import mimo

_MAX_LISTED = 20  # entries of a list that are printed; --json prints all


def inspect(path: Path, config: Config | None = None, key_map: Path | None = None) -> dict[str, Any]:
    """Describes `path`: parts, tensors, bytes, dtypes and files of PyTorch weights and, with a config, the mismatches; or step,
    parameters and provenance of a mimo_jax checkpoint. Raises UserError for anything else."""
    if path.is_dir() and ((path / "base.json").is_file() or (path.parent.parent / "base.json").is_file()):
        return _inspect_checkpoint(path)
    config_for_sizes = config or Config()
    source = Source("path", path, name_map.layer_indices(config_for_sizes.model), read_key_map(key_map) if key_map else ())
    found: dict[str, Any] = {
        "path": str(path),
        "parts": [{"title": part.component.title, "prefix": part.prefix} for part in source.found],
        "tensors": len(source.kinds),
        "bytes": sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in source.kinds.values()),
        "dtypes": dict(Counter(str(dtype) for dtype, _ in source.kinds.values())),
        "files": {file.name: file.stat().st_size for file in source.tensors.files},
    }
    if source.kept:
        found["kept for export, not used"] = source.kept
    if config is not None:
        found |= _fit(source, config)
    return found


def _fit(source: Source, config: Config) -> dict[str, Any]:
    """Compares a source with a config: mismatches of the parameters that its parts fill, and settings that differ."""
    leaves = pathtree.flatten(mimo.abstract(config)[1])
    embedding = next((source.kinds[p.prefix + rows.EMBEDDING_KEY][1][0] for p in source.found if p.component.is_language_model()), 0)
    if embedding == config.model.llm.vocab_size + len(config.model.grounding_tokens()):
        source.vocabulary = Vocabulary({}, np.arange(embedding), [[token, 0] for token in config.model.grounding_tokens()])
    roots = {path.split("/")[0] for path in source.paths()} - {"embedding", "lm_head"}
    covered = {path for row in source.rows for path in name_map.paths_of(row)}
    lora = "lora" in source.parts
    wanted = {
        path: leaf
        for path, leaf in leaves.items()
        if path in covered and (path.split("/")[0] in roots or path in source.paths()) and ("lora_" not in path or lora)
    }
    if source.parts == {"lora"}:
        wanted = {path: leaf for path, leaf in wanted.items() if "lora_" in path}
    found: dict[str, Any] = dict(name_map.mismatches(source.shapes(), source.rows, source.indices, wanted, source.ignored))
    try:
        hf_config_check.check_settings(source.name, source.path, source.parts, config)
    except SettingsError as error:
        found["other settings"] = [line.strip() for line in str(error).split("\n")[1:]]
    return found


def _inspect_checkpoint(path: Path) -> dict[str, Any]:
    run, step = checkpoint.resolve(path)
    leaves = loading.LazyParams(path)
    sizes: Counter[str] = Counter()
    for name, leaf in leaves.shapes.items():
        sizes[name.split("/")[0]] += leaf.size
    record = provenance.read(run)
    sources = {name: f"{', '.join(s['layout'])}; {s['path']}; {s['fingerprint'][:12]}" for name, s in record.get("sources", {}).items()}
    return {
        "path": str(path),
        "checkpoint": f"mimo_jax, config {leaves.config.name}, step {step}",
        "parameters": dict(sizes),
        "trained": sum(leaf.size for name, leaf in leaves.shapes.items() if name in leaves.trained),
        "bytes": sum(leaf.dtype.itemsize * leaf.size for leaf in leaves.shapes.values()),
        "dtypes": dict(Counter(str(leaf.dtype) for leaf in leaves.shapes.values())),
        "base": frozen_params.read_record(run)["fingerprint"],
        "sources": sources,
        "untrained": provenance.untrained(record) or "none",
    }


def describe(found: dict[str, Any]) -> str:
    """The result of `inspect` as text."""
    lines = []
    for name, value in found.items():
        if name == "bytes":
            lines.append(f"size: {value / 1e9:.3f} GB")
        elif name == "parts":
            lines += [f"part: {part['title']}" + (f", with prefix {part['prefix']}" if part["prefix"] else "") for part in value]
        elif isinstance(value, dict):
            shown = (f"{key} {entry:,}" if isinstance(entry, int) else f"{key}: {entry}" for key, entry in value.items())
            lines.append(f"{name}: " + "; ".join(shown))
        elif isinstance(value, list):
            lines.append(f"{name}: {len(value) or 'none'}")
            lines += [f"  {entry}" for entry in value[:_MAX_LISTED]]
            lines += [f"  and {len(value) - _MAX_LISTED} more"] if len(value) > _MAX_LISTED else []
        else:
            lines.append(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
    return "\n".join(lines)
