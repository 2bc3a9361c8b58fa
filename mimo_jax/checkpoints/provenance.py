"""The origin of a checkpoint's weights: RUN/provenance.json, written by an import and copied to the runs that start from it.

    sources     name -> {path, layout, dtypes, tensors, fingerprint, files {name: SHA-256}} of each set of files that was read
    untrained   paths of parameters that the model needs and that were initialised from a seed and never trained
    base, parameters   fingerprints of the import's frozen and other parameters
    named       name and version of the named model that it is or was trained from (`named`)

It also records the options of the import: seed, key map, exceptions. Tensors that this model does not use but that are kept for export
are in kept.safetensors, next to it.
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
    """The provenance of a run's weights, {} for a run initialised from a seed. Raises UserError for a damaged file, because it may
    record that parameters were never trained."""
    record = files.read_json(run / FILE)
    if record is None and (run / FILE).exists():
        raise UserError(f"{run / FILE}: is damaged, so the origin of the weights is unknown; copy it from where the run was made")
    return record or {}


def copy_to_run(source: Path, run: Path, frozen: Collection[str]) -> None:
    """Copy the provenance of `source` to a run that starts from it. Of the untrained parameters, only the `frozen` ones remain so."""
    record = read(source)
    if not record:
        return
    files.write_json(run / FILE, record | {"untrained": [path for path in record["untrained"] if path in frozen]})
    if (source / KEPT).is_file():
        shutil.copy(source / KEPT, run / KEPT)


def untrained(record: dict) -> str:
    """The number of untrained parameters in each part of the model, as "aligner (46), prompt (2)"; empty if there are none."""
    parts = Counter(path.split("/")[0] for path in record.get("untrained", []))
    return ", ".join(f"{part} ({count})" for part, count in parts.items())


def describe(record: dict) -> str:
    """The sources of the weights in one line, with the beginnings of their fingerprints."""
    sources = ", ".join(f"{name} {source['fingerprint'][:12]}" for name, source in record.get("sources", {}).items())
    weights = f"weights: {sources}" if sources else "weights: trained from a seed"
    return f"from the named model {record['named']}, {weights}" if "named" in record else weights
