"""Where a checkpoint's weights come from: RUN/provenance.json, written by an import and handed on to what is trained from it.

    sources     name -> {path, layout, dtypes, tensors, fingerprint, files {name: SHA-256}} of each file set that was read
    untrained   paths of parameters drawn from a seed that no training has touched, and that the model needs
    base, parameters   fingerprints of the import's frozen and other parameters

and what an import was told: seed, key map, exceptions. Tensors that were kept though nothing here uses them lie beside it,
in kept.safetensors.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from mimo_jax import files
from mimo_jax.errors import UserError

FILE, KEPT = "provenance.json", "kept.safetensors"


def read(run: Path) -> dict:
    """What is known of a run's weights; nothing for one that began from its own seed. UserError where it cannot be read: it may
    say that parameters were never trained."""
    record = files.read_json(run / FILE)
    if record is None and (run / FILE).exists():
        raise UserError(f"{run / FILE}: is damaged, so where the weights come from cannot be told; copy it from where the run was made")
    return record or {}


def copy_to_run(source: Path, run: Path, frozen: Collection[str]) -> None:
    """What is known of `source` goes on to a run that starts from it; of what was untrained, only the `frozen` stays so."""
    record = read(source)
    if not record:
        return
    files.write_json(run / FILE, record | {"untrained": [path for path in record["untrained"] if path in frozen]})
    if (source / KEPT).is_file():
        shutil.copy(source / KEPT, run / KEPT)


def untrained(record: dict) -> str:
    """The untrained parameters by their part of the model, "aligner (46), prompt (2)"; empty if there are none."""
    parts = Counter(path.split("/")[0] for path in record.get("untrained", []))
    return ", ".join(f"{part} ({count})" for part, count in parts.items())


def describe(record: dict) -> str:
    """The sources in one line, with the beginnings of their fingerprints."""
    sources = ", ".join(f"{name} {source['fingerprint'][:12]}" for name, source in record.get("sources", {}).items())
    return f"weights: {sources}" if sources else "weights: trained from a seed"
