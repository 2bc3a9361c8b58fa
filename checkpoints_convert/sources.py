"""The given checkpoints: their tensors under normalised names, the parts found among them, and the source of each parameter.

vision, llm, sam     one model each        lora      an adapter of the language model
joint              a whole model (LISA, GLaMM, MIMO)   overlay   tensors of a whole model that replace those of other sources
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from checkpoints_convert import layouts, name_map, rows
from checkpoints_convert.batch_norm import FoldedTensors
from checkpoints_convert.hf_config_check import settings_of
from checkpoints_convert.ops import OPS
from checkpoints_convert.readers import gguf_of, open_tensors
from checkpoints_convert.rows import Row
from checkpoints_convert.vocabulary import Vocabulary, VocabularyError, find_tokenizer, read_vocabulary
from mimo_jax.config import Config, ConfigError
from mimo_jax.errors import UserError

SOURCES = ("vision", "llm", "sam", "lora", "joint", "overlay")
SEED = "seed"


class SourceError(UserError):
    """A source that cannot be used, or a parameter that no given source can fill; the message names the remedy."""


@dataclass
class Source:
    """One given checkpoint. kinds: {normalised key: (dtype, shape)}; found: its components; rows: the rows that apply to it; ignored:
    regexes of other keys that it may have; kept: keys that are not used, but kept for export."""

    name: str
    path: Path
    indices: name_map.Indices
    key_map: Sequence[Row] = ()
    found: list[layouts.DetectedComponent] = field(init=False)
    vocabulary: Vocabulary | None = field(init=False, default=None)

    def __post_init__(self):
        self.tensors = FoldedTensors(open_tensors(self.path))
        spelt = layouts.normalize_keys(self.tensors)
        for first, *others in spelt.values():
            for other in others:
                if not np.array_equal(self.tensors[first], self.tensors[other]):
                    raise SourceError(f"{self.path}: {first} and {other} are the same parameter with different values; give one checkpoint")
        self._names = {key: names[0] for key, names in spelt.items()}
        self.found = layouts.detect(self._names)
        if not self.found and not self._matching_rows(self.key_map):
            shown = ", ".join(list(self._names)[:3])
            raise SourceError(
                f"--{self.name} {self.path}: has no known model among its {len(self._names)} tensors ({shown}, …); give --key-map"
            )
        self.kept = sorted(key for key in self._names if re.search(layouts.KEPT, key))
        kinds = {key: self.tensors.kinds[name] for key, name in self._names.items()}
        # A tied head is the embedding itself and is not stored in the file.
        self._tied = {}
        for part in self.found:
            embedding, head = part.prefix + rows.EMBEDDING_KEY, part.prefix + rows.HEAD_KEY
            if part.component.is_language_model() and head not in kinds and _is_tied(self.path):
                self._tied[head] = embedding
                kinds[head] = kinds[embedding]
        self.kinds = kinds

    @property
    def parts(self) -> set[str]:
        return {part.name for part in self.found}

    @property
    def rows(self) -> tuple[Row, ...]:
        """The tables of its components with their prefixes, and the rows of the key map, which replace rows for the same parameters."""
        given = {path for row in self.key_map for path in name_map.paths_of(row)}
        tables = []
        for part in self.found:
            table = part.component.rows
            if part.component.is_language_model() and not (self.vocabulary and self.vocabulary.grounding):
                table = rows.without_grounding(table)
            tables += layouts.with_prefix(table, part.prefix)
        return (*(row for row in tables if not given & set(name_map.paths_of(row))), *self.key_map)

    @property
    def ignored(self) -> tuple[str, ...]:
        return (layouts.KEPT, *(pattern for part in self.found for pattern in part.component.ignored))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: shape for key, (_, shape) in self.kinds.items()}

    def paths(self) -> set[str]:
        """Parameters of which this source has at least one tensor."""
        return {path for row in self._matching_rows(self.rows) for path in name_map.paths_of(row)}

    def _matching_rows(self, table: Sequence[Row]) -> list[Row]:
        """The rows of a table of which this source has at least one tensor."""
        return [row for row in table if any(key in self._names for key in name_map.keys_of(row, self.indices).ravel())]

    def read_vocabulary(self, folders: Sequence[Path], tokens: Sequence[str]) -> None:
        """Determine the order of the vocabulary's rows, if this source has a language model."""
        words = [part for part in self.found if part.component.is_language_model()]
        if words:
            count = self.kinds[words[0].prefix + rows.EMBEDDING_KEY][1][0]
            self.vocabulary = read_vocabulary(find_tokenizer(folders), count, tokens)

    def __getitem__(self, key: str) -> np.ndarray:
        """A tensor by its normalised key; the rows of the vocabulary are reordered as in this project."""
        tensor = self.tensors[self._names[self._tied.get(key, key)]]
        if self.vocabulary and self.vocabulary.grounding and key.endswith((rows.EMBEDDING_KEY, rows.HEAD_KEY)):
            return tensor[self.vocabulary.order]
        return tensor

    def __contains__(self, key: str) -> bool:
        return key in self.kinds


def _is_tied(path: Path) -> bool:
    return bool(settings_of(path).get("tie_word_embeddings"))


def read_key_map(path: Path) -> tuple[Row, ...]:
    """Rows of a user's key map, a JSON list of [torch key, parameter path] or [torch key, parameter path, op]."""
    try:
        made = tuple(Row(*(str(part) for part in row)) for row in json.loads(path.read_text()))
    except FileNotFoundError:
        raise SourceError(f"--key-map {path}: no such file; give a JSON file") from None
    except (ValueError, TypeError) as error:
        raise SourceError(f"--key-map {path}: is not a JSON list of [torch key, path, op] rows ({error})") from None
    unknown = sorted({row.op for row in made} - OPS.keys())
    if unknown:
        raise SourceError(f"--key-map {path}: unknown op {', '.join(unknown)}; known are {', '.join(OPS)}")
    return made


def open_sources(given: Mapping[str, Path], key_map: Sequence[Row], config: Config) -> dict[str, Source]:
    """Open every given source, with the vocabulary of those that have a language model."""
    indices = name_map.layer_indices(config.model)
    with_key_map = ("joint", "overlay")
    sources = {name: Source(name, Path(given[name]), indices, key_map if name in with_key_map else ()) for name in SOURCES if name in given}
    given_paths = [Path(given[name]) for name in ("overlay", "joint", "llm") if name in given]
    folders = [gguf_of(path) or (path if path.is_dir() else path.parent) for path in given_paths]
    if config.tokenizer and config.tokenizer != "train":
        folders = [Path(config.tokenizer)]
        if not folders[0].is_file():
            raise ConfigError(f"config.tokenizer: no file {config.tokenizer}; name the tokenizer.json of the checkpoint")
    for source in sources.values():
        source.read_vocabulary(folders, config.model.grounding_tokens())
    return sources


def assign(leaves: Sequence[str], sources: Mapping[str, Source], config: Config) -> dict[str, str]:
    """{path: the source that fills it, or "seed"}, by `config.init.sources`: the first of a row's sources that has any parameter
    of its group; parameters of an overlay come from the overlay. Raises SourceError for parameters that no given source can fill."""
    available = {name: source.paths() for name, source in sources.items()}
    groups: dict[str, list[str]] = {}
    for path in leaves:
        pattern = next((pattern for pattern in config.init.sources if re.search(pattern, path)), None)
        if pattern is None:
            raise ConfigError(f"config.init.sources: no row matches parameter {path!r}; add one")
        groups.setdefault(pattern, []).append(path)
    made: dict[str, str] = {}
    unfilled = []
    for pattern, paths in groups.items():
        allowed = [name.strip() for name in config.init.sources[pattern].split(",")]
        unknown = set(allowed) - {*SOURCES, SEED}
        if unknown:
            raise ConfigError(f"config.init.sources[{pattern!r}]: {', '.join(sorted(unknown))} unknown; use {', '.join((*SOURCES, SEED))}")
        given = [name for name in allowed if name in sources]
        chosen = next((name for name in given if available[name] & set(paths)), None)
        if chosen is None and SEED in allowed:
            chosen = SEED
        chosen = chosen or next(iter(given), None)
        over = available.get("overlay", set())
        if chosen is None and not set(paths) <= over:
            flags = " or ".join(f"--{name}" for name in allowed)
            unfilled.append(f"{', '.join(sorted({path.split('/')[0] for path in paths}))} ({flags})")
        made |= {path: "overlay" if path in over else chosen for path in paths if chosen or path in over}
    if unfilled:
        raise SourceError(f"no given checkpoint fills {'; '.join(unfilled)}; give one")
    return made


def vocabulary_of(assigned: Mapping[str, str], sources: Mapping[str, Source], config: Config) -> Vocabulary:
    """The vocabulary of the source that fills the base embedding; raises VocabularyError if its size is not that of the configuration."""
    vocabulary = sources[assigned["embedding/base"]].vocabulary
    if vocabulary is None:
        raise VocabularyError(f"--{assigned['embedding/base']}: has no embedding of a language model; give a language model")
    size, base_size = config.model.llm.vocab_size, vocabulary.base_size
    if size != base_size:
        rest = f", {', '.join(name for name, _ in vocabulary.grounding)} in addition" if vocabulary.grounding else ""
        raise VocabularyError(
            f"the checkpoint's vocabulary has {base_size} rows{rest}, the configuration has {size}; "
            f"set --config.model.llm.vocab_size={base_size}"
        )
    added = {token["content"] for token in vocabulary.tokenizer["added_tokens"]}
    absent = [name for name in config.image_tokens() if name not in added]
    if absent:
        raise VocabularyError(
            f"the checkpoint's tokenizer has no {' and no '.join(absent)}; name the tokens around its images with "
            "--config.data.image_tokens=A,B, or none with --config.data.image_tokens="
        )
    return vocabulary


def list_mismatches(
    assigned: Mapping[str, str],
    sources: Mapping[str, Source],
    leaves: Mapping[str, np.ndarray],
    indices: name_map.Indices,
    allow_missing: Sequence[str] = (),
    ignore_extra: Sequence[str] = (),
) -> tuple[dict[str, dict[str, list[str]]], dict[str, list[str]]]:
    """({source: mismatches} that stop an import, {"allowed_missing", "ignored_extra": keys} that the user's regexes waive)."""
    problems: dict[str, dict[str, list[str]]] = {}
    waived: dict[str, list[str]] = {"allowed_missing": [], "ignored_extra": []}
    for name, source in sources.items():
        covered = {path for row in source.rows for path in name_map.paths_of(row)}
        own = {path for path, home in assigned.items() if home == name}
        wrong = name_map.mismatches(source.shapes(), source.rows, indices, {path: leaves[path] for path in own & covered}, source.ignored)
        wrong["parameters without a row (see --key-map)"] = sorted(own - covered)
        if name != "overlay":  # tensors that an overlay replaces are optional
            replaced = {path: leaves[path] for path, home in assigned.items() if home == "overlay" and path in covered}
            spare = name_map.torch_shapes(replaced, source.rows, indices)
            wrong["left over"] = [key for key in wrong["left over"] if key not in spare]
        for kind, patterns, record in (("missing", allow_missing, "allowed_missing"), ("left over", ignore_extra, "ignored_extra")):
            waived_keys = [key for key in wrong[kind] if any(re.search(pattern, key) for pattern in patterns)]
            waived[record] += waived_keys
            wrong[kind] = [key for key in wrong[kind] if key not in set(waived_keys)]
        problems[f"--{name} {source.path}"] = wrong
    return problems, waived


def origins(sources: Mapping[str, Source], hashes: Mapping[Path, str]) -> dict[str, dict]:
    """The entries of provenance.json for the sources. hashes: SHA-256 of every file that was read."""
    made = {}
    for name, source in sources.items():
        files = {file.name: hashes[file] for file in source.tensors.files}
        made[name] = {
            "path": str(source.path.resolve()),
            "layout": [found.component.title for found in source.found],
            "tensors": len(source.kinds),
            "dtypes": dict(Counter(str(dtype) for dtype, _ in source.kinds.values())),
            "fingerprint": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
            "files": files,
        }
    return made
