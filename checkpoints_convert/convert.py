"""`mimo convert import`: PyTorch checkpoints to a mimo_jax checkpoint, which may be larger than memory.

Everything is checked before a byte is written: names, shapes, settings, vocabulary, disk space, then every value. The checkpoint is
written to a folder next to the target, which replaces it only when it is complete.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from checkpoints_convert import hf_config_check, name_map, sam_families, sources
from checkpoints_convert.name_map import KeyMapError
from checkpoints_convert.readers import is_finite
from checkpoints_convert.sources import SEED, Source, SourceError
from checkpoints_convert.staging import check_output_folder
from checkpoints_convert.vocabulary import Vocabulary
from mimo_jax import files, parameters, pathtree
from mimo_jax.checkpoints import checkpoint, frozen_params, provenance, storage
from mimo_jax.checkpoints.arrays import CheckpointError
from mimo_jax.config import Config, ConfigError
from mimo_jax.data.tokenizer import add_grounding
from mimo_jax.models import llama, mimo

_SPARE_BYTES = 64 * 2**20  # disk space for files other than arrays
# Initialised from the seed without effect: LoRA's B is zero, so that LoRA changes nothing until it is trained.
_NEUTRAL = r"/lora_[ab]$"


@dataclass
class ImportRequest:
    """The options of an import.

    given: {source: path} of `sources.SOURCES`; sam_family: a name of `sam_families.FAMILIES`, or OTHER, if that of SAM's file does not show
    it; key_map: JSON file with rows in addition to the tables; allow_missing, ignore_extra (regexes), ignore_setting (keys
    of a config.json) and allow_nonfinite waive checks that otherwise stop the import, and are recorded; log: prints a line."""

    config: Config
    given: Mapping[str, Path]
    out: Path
    seed: int = 0
    key_map: Path | None = None
    lora_alpha: float | None = None
    lora_base: str | None = None
    sam_family: str | None = None
    allow_missing: Sequence[str] = ()
    ignore_extra: Sequence[str] = ()
    ignore_setting: Sequence[str] = ()
    allow_nonfinite: bool = False
    log: Callable[[str], None] = field(default=print)


class _ImportPlan:
    """An import that has been checked against the files' headers: the source, shape and dtype of every parameter."""

    def __init__(self, request: ImportRequest):
        config = self.config = request.config
        for name, path in request.given.items():
            if not Path(path).exists():
                raise SourceError(f"--{name} {path}: no such file or folder; give the path of a checkpoint")
        rows = sources.read_key_map(request.key_map) if request.key_map else ()
        self.sources = sources.open_sources(request.given, rows, config)
        self.remarks = self._check_settings(request)
        self._check_lora(request)
        _, shapes = mimo.abstract(config)
        self.leaves = pathtree.flatten(parameters.with_dtypes(config, shapes))
        self.trained = {path for path, value in parameters.multipliers(config, shapes).items() if value is not None}
        self.assigned = sources.assign(list(self.leaves), self.sources, config)
        self.indices = name_map.layer_indices(config.model)
        self.vocabulary: Vocabulary = sources.vocabulary_of(self.assigned, self.sources, config)
        self.tokenizer = self._tokenizer()
        problems, self.waived = sources.list_mismatches(
            self.assigned, self.sources, self.leaves, self.indices, request.allow_missing, request.ignore_extra
        )
        name_map.raise_listed(problems)
        incomplete = set(self.waived["allowed_missing"])
        self.drawn = {
            *(path for path, home in self.assigned.items() if home == SEED),
            *(path for path in self.leaves if incomplete and incomplete & set(self.keys(path))),
        }
        self.untrained = sorted(path for path in self.drawn if not re.search(_NEUTRAL, path))

    def _check_settings(self, request: ImportRequest) -> list[str]:
        """Remarks on sources without a config.json. Raises one SettingsError that lists all settings that differ."""
        remarks, wrong = [], []
        for name, source in self.sources.items():
            try:
                remarks.append(hf_config_check.check_settings(name, source.path, source.parts, self.config, request.ignore_setting))
                if source.parts & {"sam", "tiny_vit"} and name != "overlay":
                    remarks.append(sam_families.check_family(name, source.path, self.config, request.sam_family))
            except hf_config_check.SettingsError as error:
                wrong.append(str(error))
        if wrong:
            raise hf_config_check.SettingsError("\n".join(wrong))
        return [remark for remark in remarks if remark]

    def _check_lora(self, request: ImportRequest) -> None:
        lora = next((source for source in self.sources.values() if "lora" in source.parts), None)
        if lora is None:
            return
        if self.config.model.lora.rank == 0:
            raise ConfigError(f"--{lora.name} {lora.path}: has LoRA, but the configuration has none; set --config.model.lora.rank")
        found = hf_config_check.lora_alpha(lora.path)
        if request.lora_alpha is not None and found is not None and request.lora_alpha != found:
            raise SourceError(f"--lora-alpha {request.lora_alpha:g}: adapter_config.json of {lora.path} has {found:g}; use one value")
        alpha = found if request.lora_alpha is None else request.lora_alpha
        if alpha is None:
            raise SourceError(f"{lora.path}: LoRA weights do not contain alpha; give the value of its training with --lora-alpha")
        self.config.model.lora.alpha = float(alpha)
        language = request.given.get("llm") or request.given.get("joint")
        if lora.name == "lora" and language:
            hf_config_check.check_adapter_base(lora.path, Path(language), request.lora_base)

    def _tokenizer(self) -> str:
        """Content of tokenizer.json, checked by loading it."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.json"
            add_grounding(self.vocabulary.tokenizer, path, self.config.model.llm.vocab_size, self.config.model.grounding_tokens())
            return path.read_text(encoding="utf-8")

    def keys(self, path: str) -> list[str]:
        """Torch keys of the tensors that fill a parameter."""
        source = self.sources.get(self.assigned[path])
        rows = source.rows if source else ()
        return [key for row in rows if path in name_map.paths_of(row) for key in name_map.keys_of(row, self.indices).ravel()]

    def wanted_keys(self, source: Source) -> set[str]:
        own = {path: leaf for path, leaf in self.leaves.items() if self.assigned[path] == source.name}
        return set(name_map.torch_shapes(own, source.rows, self.indices)) & source.kinds.keys()

    def bytes(self) -> int:
        kept = [source.kinds[key] for source in self.sources.values() for key in source.kept]
        leaves = [(leaf.dtype, leaf.shape) for leaf in self.leaves.values()]
        return sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in (*leaves, *kept))

    def stream(self, only: Collection[str], drawn: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """(path, array) of the parameters in `only`, source by source, with one in memory at a time. drawn: arrays from the seed."""
        for name, source in self.sources.items():
            own = {path: leaf for path, leaf in self.leaves.items() if self.assigned[path] == name}
            yield from name_map.import_leaves(source, source.rows, self.indices, own, only, drawn)
        for path in sorted(only):
            if self.assigned[path] == SEED:
                yield path, drawn[path]


def import_checkpoint(request: ImportRequest) -> dict[str, Any]:
    """Convert, and return the content of provenance.json. Raises subclasses of UserError for problems with the input; then
    nothing is written."""
    out = files.absolute(request.out)
    check_output_folder(out)
    plan = _ImportPlan(request)
    check_output_folder(out, plan.bytes() + _SPARE_BYTES)
    _report(plan, request.log)
    started = time.monotonic()
    hashes, nonfinite = _verify(plan)
    if nonfinite and not request.allow_nonfinite:
        first = f"{len(nonfinite)} tensors contain NaN or Inf (--allow-nonfinite imports them unchanged)"
        raise KeyMapError("\n".join([first, *nonfinite]))
    request.log(f"read and hashed {len(hashes)} files: {time.monotonic() - started:.0f} s")
    with files.disk_errors(out, CheckpointError), files.atomic_folder(out) as stage:
        record = _write(plan, request, stage, out, hashes, nonfinite)
    request.log(f"written to {out}: {time.monotonic() - started:.0f} s; base {record['base'][:12]}")
    return record


def _write(plan: _ImportPlan, request: ImportRequest, stage: Path, out: Path, hashes: dict, nonfinite: list[str]) -> dict[str, Any]:
    config = plan.config
    config.init.path = ""
    drawn = _draw(plan, request.seed)
    drawn |= _draw_grounding(plan, request.seed, drawn)
    frozen = frozen_params.write(stage, plan.stream(plan.leaves.keys() - plan.trained, drawn), out)
    trained = checkpoint.write_step(stage, 0, plan.stream(plan.trained, drawn), {})
    record = {
        "sources": sources.origins(plan.sources, hashes),
        "seed": request.seed,
        "untrained": plan.untrained,
        "neutral": sorted(plan.drawn - set(plan.untrained)),
        **plan.waived,
        "allow_missing": list(request.allow_missing),
        "ignore_extra": list(request.ignore_extra),
        "ignore_setting": list(request.ignore_setting),
        "nonfinite": nonfinite,
        "key_map": request.key_map.read_text() if request.key_map else None,
        "grounding": plan.vocabulary.grounding,
        "base": frozen["fingerprint"],
        "parameters": frozen_params.fingerprint(trained),
    }
    (stage / "tokenizer.json").write_text(plan.tokenizer, encoding="utf-8")
    kept = {key: np.ascontiguousarray(source[key]) for source in plan.sources.values() for key in source.kept}
    if kept:
        save_file(kept, stage / provenance.KEPT)
    files.write_json(stage / provenance.FILE, record)
    files.write_json(stage / "config.json", config.to_dict())
    return record


def _report(plan: _ImportPlan, log: Callable[[str], None]) -> None:
    for name, source in plan.sources.items():
        parts = ", ".join(found.component.title for found in source.found) or "rows of the key map"
        log(f"{name}: {source.path} ({parts}; {len(source.kinds)} tensors)")
    for remark in plan.remarks:
        log(remark)
    raw = provenance.untrained({"untrained": plan.untrained})
    if raw:
        log(f"initialised from the seed, to be trained: {raw}")
    if plan.drawn - set(plan.untrained):
        log("initialised from the seed, without effect until trained: LoRA")
    kept = sum(len(source.kept) for source in plan.sources.values())
    if kept:
        log(f"not used, kept for export: {kept} tensors of a region encoder")
    for kind, keys in plan.waived.items():
        if keys:
            log(f"{kind.replace('_', ' ')}: {len(keys)} tensors, listed in {provenance.FILE}")


def _verify(plan: _ImportPlan) -> tuple[dict[Path, str], list[str]]:
    """(SHA-256 of every file, names of tensors with NaN or Inf); files are hashed in a second thread."""

    def nonfinite(source: Source) -> list[str]:
        return [f"  --{source.name}: {key}" for key in sorted(plan.wanted_keys(source)) if not is_finite(source[key])]

    with ThreadPoolExecutor(1) as pool:
        paths = [file for source in plan.sources.values() for file in source.tensors.files]
        hashing = pool.submit(lambda: {file: storage.hash_files(file.parent, [file.name])[file.name] for file in paths})
        bad = [line for source in plan.sources.values() for line in nonfinite(source)]
        return hashing.result(), bad


def _draw(plan: _ImportPlan, seed: int) -> dict[str, np.ndarray]:
    """The parameters that are initialised from the seed, as the model initialises them; the others are never computed."""
    if not plan.drawn:
        return {}
    wanted = tuple(sorted((path, str(plan.leaves[path].dtype)) for path in plan.drawn))
    return jax.tree.map(np.asarray, _drawer(plan.config.model_json(), wanted)(jax.random.key(seed)))


def _draw_grounding(plan: _ImportPlan, seed: int, drawn: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of the grounding tokens that no source has, which follow the statistics of the base that is imported."""
    made = {}
    for path, axis in llama.GROUNDING_AXES.items():
        if path in plan.drawn:
            ((_, base),) = plan.stream([path.replace("grounding", "base")], drawn)
            key = jax.random.fold_in(jax.random.key(seed), axis)
            made[path] = np.asarray(jax.jit(llama.draw_grounding, static_argnums=(0, 2))(path, base, drawn[path].shape[axis], key))
    return made


@functools.lru_cache(maxsize=8)
def _drawer(model_json: str, wanted: tuple[tuple[str, str], ...]) -> Callable:
    """Jitted: key -> {path: array} of some of a model's initial parameters."""
    config = Config.from_dict({"model": json.loads(model_json)})

    def make(key):
        flat = pathtree.flatten(mimo.init_params(config, key))
        return {path: flat[path].astype(dtype) for path, dtype in wanted}

    return jax.jit(make)
