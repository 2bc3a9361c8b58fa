"""What the user gives, opened: tensors under the tables' names, the parts found among them, and which parameter comes from where.

vision, llm, sam     one model each        lora      an adapter of the language model
joint              a whole model (LISA, GLaMM, MIMO)   overlay   some tensors of a whole model, in place of the others'
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
from checkpoints_convert.hf_config_check import read_settings
from checkpoints_convert.ops import OPS
from checkpoints_convert.readers import open_tensors
from checkpoints_convert.rows import Row
from checkpoints_convert.vocabulary import Vocabulary, VocabularyError, find_tokenizer, read_vocabulary
from mimo_jax.config import Config, ConfigError
from mimo_jax.errors import UserError

SOURCES = ("vision", "llm", "sam", "lora", "joint", "overlay")
SEED = "seed"


class SourceError(UserError):
    """A source that is none, or a parameter that none of the given ones can fill; the message says what to give."""


@dataclass
class Source:
    """One given checkpoint. kinds: {key: (dtype, shape)} under the tables' names; found: its parts; rows: the tables that apply to
    it; ignored: regexes of what else it may hold; kept: keys that nothing here uses, handed on to export."""

    name: str
    path: Path
    indices: name_map.Indices
    key_map: Sequence[Row] = ()
    found: list[layouts.DetectedComponent] = field(init=False)
    vocabulary: Vocabulary | None = field(init=False, default=None)

    def __post_init__(self):
        self.tensors = open_tensors(self.path)
        spelt = layouts.normalize_keys(self.tensors)
        for first, *others in spelt.values():
            for other in others:
                if not np.array_equal(self.tensors[first], self.tensors[other]):
                    raise SourceError(f"{self.path}: {first} and {other} are one parameter with different values; give one checkpoint")
        self._names = {key: names[0] for key, names in spelt.items()}
        self.found = layouts.detect(self._names)
        if not self.found and not self._holding(self.key_map):
            shown = ", ".join(list(self._names)[:3])
            raise SourceError(f"--{self.name} {self.path}: no known model is among its {len(self._names)} tensors ({shown}, …)")
        self.kept = sorted(key for key in self._names if re.search(layouts.KEPT, key))
        kinds = {key: self.tensors.kinds[name] for key, name in self._names.items()}
        # A tied head is the embedding itself, and not in the file.
        self._tied = {}
        for part in self.found:
            embedding, head = part.prefix + rows.EMBEDDING_KEY, part.prefix + rows.HEAD_KEY
            if part.component.has_words() and head not in kinds and _is_tied(self.path):
                self._tied[head] = embedding
                kinds[head] = kinds[embedding]
        self.kinds = kinds

    @property
    def parts(self) -> set[str]:
        return {part.name for part in self.found}

    @property
    def rows(self) -> tuple[Row, ...]:
        """The tables of its parts with their prefixes, and the user's rows, which stand in for any that fill the same parameters."""
        given = {path for row in self.key_map for path in name_map.paths_of(row)}
        tables = []
        for part in self.found:
            table = part.component.rows
            if part.component.has_words() and not (self.vocabulary and self.vocabulary.grounding):
                table = rows.without_grounding(table)
            tables += layouts.with_prefix(table, part.prefix)
        return (*(row for row in tables if not given & set(name_map.paths_of(row))), *self.key_map)

    @property
    def ignored(self) -> tuple[str, ...]:
        return (layouts.KEPT, *(pattern for part in self.found for pattern in part.component.ignored))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: shape for key, (_, shape) in self.kinds.items()}

    def paths(self) -> set[str]:
        """Parameters of which any tensor is here."""
        return {path for row in self._holding(self.rows) for path in name_map.paths_of(row)}

    def _holding(self, table: Sequence[Row]) -> list[Row]:
        """Those rows of a table of which any tensor is here."""
        return [row for row in table if any(key in self._names for key in name_map.keys_of(row, self.indices).ravel())]

    def read_vocabulary(self, folders: Sequence[Path], tokens: Sequence[str]) -> None:
        """Find the order of the vocabulary's rows, if this source has a language model."""
        words = [part for part in self.found if part.component.has_words()]
        if words:
            count = self.kinds[words[0].prefix + rows.EMBEDDING_KEY][1][0]
            self.vocabulary = read_vocabulary(find_tokenizer(folders), count, tokens)

    def __getitem__(self, key: str) -> np.ndarray:
        """A tensor under the tables' name; the vocabulary's rows in the order that they have here."""
        tensor = self.tensors[self._names[self._tied.get(key, key)]]
        if self.vocabulary and self.vocabulary.grounding and key.endswith((rows.EMBEDDING_KEY, rows.HEAD_KEY)):
            return tensor[self.vocabulary.order]
        return tensor

    def __contains__(self, key: str) -> bool:
        return key in self.kinds


def _is_tied(path: Path) -> bool:
    return bool(read_settings((path if path.is_dir() else path.parent) / "config.json").get("tie_word_embeddings"))


def read_key_map(path: Path) -> tuple[Row, ...]:
    """Rows of a user's key map, a JSON list of [torch key, path here] or [torch key, path here, op]."""
    try:
        made = tuple(Row(*(str(part) for part in row)) for row in json.loads(path.read_text()))
    except FileNotFoundError:
        raise SourceError(f"--key-map {path}: there is no such file") from None
    except (ValueError, TypeError) as error:
        raise SourceError(f"--key-map {path}: is not a JSON list of [torch key, path, op] rows ({error})") from None
    unknown = sorted({row.op for row in made} - OPS.keys())
    if unknown:
        raise SourceError(f"--key-map {path}: unknown op {', '.join(unknown)}; known are {', '.join(OPS)}")
    return made


def open_sources(given: Mapping[str, Path], key_map: Sequence[Row], config: Config) -> dict[str, Source]:
    """Every given source, and the vocabulary of those with a language model."""
    indices = name_map.layer_indices(config.model)
    whole = ("joint", "overlay")
    sources = {name: Source(name, Path(given[name]), indices, key_map if name in whole else ()) for name in SOURCES if name in given}
    folders = [path if path.is_dir() else path.parent for name in ("overlay", "joint", "llm") for path in [given.get(name)] if path]
    if config.tokenizer and config.tokenizer != "train":
        folders = [Path(config.tokenizer)]
        if not folders[0].is_file():
            raise ConfigError(f"config.tokenizer: no file {config.tokenizer}; name the tokenizer.json of the checkpoint")
    for source in sources.values():
        source.read_vocabulary(folders, config.model.grounding_tokens())
    return sources


def assign(leaves: Sequence[str], sources: Mapping[str, Source], config: Config) -> dict[str, str]:
    """{path: the source that fills it, or "seed"}: by `config.init.sources`, the first of a row's sources that holds any parameter
    of its group; what an overlay holds, comes from there. SourceError for what no given source can fill."""
    there = {name: source.paths() for name, source in sources.items()}
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
        chosen = next((name for name in given if there[name] & set(paths)), None)
        if chosen is None and SEED in allowed:
            chosen = SEED
        chosen = chosen or next(iter(given), None)
        over = there.get("overlay", set())
        if chosen is None and not set(paths) <= over:
            flags = " or ".join(f"--{name}" for name in allowed)
            unfilled.append(f"{', '.join(sorted({path.split('/')[0] for path in paths}))} ({flags})")
        made |= {path: "overlay" if path in over else chosen for path in paths if chosen or path in over}
    if unfilled:
        raise SourceError(f"no given checkpoint fills {'; '.join(unfilled)}")
    return made


def vocabulary_of(assigned: Mapping[str, str], sources: Mapping[str, Source], config: Config) -> Vocabulary:
    """The vocabulary of the source that fills the base's embedding; VocabularyError where its size is not the configuration's."""
    vocabulary = sources[assigned["embedding/base"]].vocabulary
    if vocabulary is None:
        raise VocabularyError(f"--{assigned['embedding/base']}: holds no embedding of a language model")
    size, there = config.model.llm.vocab_size, vocabulary.base_size
    if size != there:
        rest = f", {', '.join(name for name, _ in vocabulary.grounding)} beside them" if vocabulary.grounding else ""
        raise VocabularyError(
            f"the checkpoint's vocabulary has {there} rows{rest}, the configuration {size}; set --config.model.llm.vocab_size={there}"
        )
    added = {token["content"] for token in vocabulary.tokenizer["added_tokens"]}
    absent = [name for name in config.image_tokens() if name not in added]
    if absent:
        raise VocabularyError(
            f"the checkpoint's tokenizer has no {' and no '.join(absent)}; name those that stand around its images with "
            "--config.data.image_tokens=A,B, or none with --config.data.image_tokens="
        )
    return vocabulary


def listed_misfits(
    assigned: Mapping[str, str],
    sources: Mapping[str, Source],
    leaves: Mapping[str, np.ndarray],
    indices: name_map.Indices,
    allow_missing: Sequence[str] = (),
    ignore_extra: Sequence[str] = (),
) -> tuple[dict[str, dict[str, list[str]]], dict[str, list[str]]]:
    """({source: misfits} that stop an import, {"allowed_missing", "ignored_extra": keys} that the user's regexes excuse)."""
    problems: dict[str, dict[str, list[str]]] = {}
    excused: dict[str, list[str]] = {"allowed_missing": [], "ignored_extra": []}
    for name, source in sources.items():
        covered = {path for row in source.rows for path in name_map.paths_of(row)}
        own = {path for path, home in assigned.items() if home == name}
        wrong = name_map.misfits(source.shapes(), source.rows, indices, {path: leaves[path] for path in own & covered}, source.ignored)
        wrong["parameters without a row for them (see --key-map)"] = sorted(own - covered)
        if name != "overlay":  # what an overlay replaces may be there, and need not be
            replaced = {path: leaves[path] for path, home in assigned.items() if home == "overlay" and path in covered}
            spare = name_map.torch_shapes(replaced, source.rows, indices)
            wrong["left over"] = [key for key in wrong["left over"] if key not in spare]
        for kind, patterns, record in (("missing", allow_missing, "allowed_missing"), ("left over", ignore_extra, "ignored_extra")):
            let = [key for key in wrong[kind] if any(re.search(pattern, key) for pattern in patterns)]
            excused[record] += let
            wrong[kind] = [key for key in wrong[kind] if key not in set(let)]
        problems[f"--{name} {source.path}"] = wrong
    return problems, excused


def origins(sources: Mapping[str, Source], hashes: Mapping[Path, str]) -> dict[str, dict]:
    """What provenance.json says of each source. hashes: SHA-256 of every file that was read."""
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
