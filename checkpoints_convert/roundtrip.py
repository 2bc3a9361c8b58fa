"""`mimo convert roundtrip`: converts random weights of a config's full size from the original layouts, compares every tensor, and
compares the time with that of copying and hashing the same files."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from checkpoints_convert import name_map, ops, rows, sam_families
from checkpoints_convert.convert import ImportRequest, import_checkpoint
from checkpoints_convert.export import save_shards
from checkpoints_convert.layouts import with_prefix
from checkpoints_convert.rows import Row
from checkpoints_convert.sources import SourceError, open_sources
from mimo_jax import files, pathtree
from mimo_jax.checkpoints.loading import LazyParams
from mimo_jax.config import Config, ConfigError
from mimo_jax.data.tokenizer import train_tokenizer
from mimo_jax.models import mimo

# Original checkpoints -> (their table, path prefixes of the parameters that they fill).
_TABLES = {
    "vision": (with_prefix(rows.CLIP, "vision_model."), ("vision/",)),
    "llm": (rows.without_grounding(rows.LLAMA), ("llm/", "embedding/base", "lm_head/base")),
    "sam": (rows.SAM, ("sam_",)),
}
_NOISE = 2**24  # random values that are drawn once and reused


class MemoryWatch:
    """Peak of this process's anonymous memory (RssAnon) in bytes, sampled while the block runs."""

    def __enter__(self) -> MemoryWatch:
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            status = Path("/proc/self/status").read_text()
            self.peak = max(self.peak, 1024 * int(status.split("RssAnon:")[1].split()[0]))

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()


def roundtrip(config: Config, workdir: Path) -> int:
    """Run the round trip in `workdir`, print the result and write report.json there. Returns 0 if every tensor is bit-identical, else 1."""
    for section, kind in (("vision", "clip"), ("llm", "llama"), ("sam", "vit")):
        if (configured := getattr(config.model, section).kind) != kind:
            raise ConfigError(f"config.model.{section}.kind: is {configured}; random weights can only be made for {kind}")
    tensors = {name: _wanted(config, table, roots) for name, (table, roots) in _TABLES.items()}
    size = 2 * sum(int(np.prod(shape)) for wanted in tensors.values() for shape in wanted.values())
    needed = int(3.1 * size)  # the originals, the checkpoint, and the timed copy
    workdir.mkdir(parents=True, exist_ok=True)
    sources, out = workdir / "sources", workdir / "import"
    for folder in (sources, out):
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{size / 1e9:.1f} GB of random bf16 weights; needs {needed / 1e9:.1f} GB of disk space in {workdir}", flush=True)
    free = shutil.disk_usage(workdir).free
    if free < needed:
        raise SourceError(f"--workdir {workdir}: needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free; choose another")
    given = {"vision": sources / "vision", "llm": sources / "llm", "sam": sources / "sam.pth"}
    started = time.monotonic()
    _make(config, tensors, given)
    print(f"made in {time.monotonic() - started:.0f} s", flush=True)

    started = time.monotonic()
    with MemoryWatch() as memory:
        import_checkpoint(ImportRequest(config, given, out, sam_family=sam_families.OTHER))
    seconds = time.monotonic() - started
    plain = _copy_and_hash(sources, workdir / "copy")
    wrong, counted = _differing(config, given, out)
    report = {
        "config": config.name,
        "bytes": size,
        "tensors": {name: len(wanted) for name, wanted in tensors.items()},
        "checked": counted,
        "differing": wrong,
        "import_s": round(seconds, 1),
        "cp_and_sha256sum_s": round(plain, 1),
        "ratio": round(seconds / plain, 2),
        "peak_rss_anon_gib": round(memory.peak / 2**30, 2),
    }
    files.write_json(workdir / "report.json", report)
    print("\n".join(f"{name}: {json.dumps(value)}" for name, value in report.items()))
    return 1 if wrong else 0


def _wanted(config: Config, table: tuple[Row, ...], roots: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    leaves = {path: leaf for path, leaf in pathtree.flatten(mimo.abstract(config)[1]).items() if path.startswith(roots)}
    leaves = {path: leaf for path, leaf in leaves.items() if "/lora_" not in path}
    return name_map.torch_shapes(leaves, table, name_map.layer_indices(config.model))


def _random(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """Normally distributed bf16 values, around 1 for the scales of norms; each tensor begins at another position of the same noise."""
    rng = np.random.default_rng(0)
    noise = (0.02 * rng.standard_normal(_NOISE, np.float32)).astype(ml_dtypes.bfloat16)
    for key, shape in shapes.items():
        size = int(np.prod(shape))
        if len(shape) == 1 and key.endswith(".weight"):
            yield key, (1 + 0.1 * rng.standard_normal(size, np.float32)).astype(ml_dtypes.bfloat16)
            continue
        run = noise[int(rng.integers(_NOISE // 2)) :]
        yield key, (run[:size] if size <= run.size else np.resize(run, size)).reshape(shape)


def _make(config: Config, tensors: dict[str, dict], given: dict[str, Path]) -> None:
    import torch

    for name in ("vision", "llm"):
        given[name].mkdir(parents=True)
        save_shards(_random(tensors[name]), given[name])
    words = ["The left lung and the right lung are outlined."] * 2
    if not config.tokenizer or config.tokenizer == "train":
        train_tokenizer(words, config.model.llm.vocab_size, given["llm"] / "tokenizer.json", config.model.grounding_tokens())
        _without_grounding(given["llm"] / "tokenizer.json", config.model.grounding_tokens())
    m = config.model
    files.write_json(
        given["vision"] / "config.json",
        {
            "hidden_size": m.vision.width,
            "num_hidden_layers": m.vision.layers,
            "num_attention_heads": m.vision.heads,
            "intermediate_size": m.vision.mlp_width,
            "hidden_act": m.vision.activation,
            "layer_norm_eps": m.vision.eps,
            "image_size": m.vision.image_size,
            "patch_size": m.vision.patch_size,
        },
    )
    files.write_json(
        given["llm"] / "config.json",
        {
            "hidden_size": m.llm.width, "num_hidden_layers": m.llm.layers, "num_attention_heads": m.llm.heads, "rms_norm_eps": m.llm.eps,
            "num_key_value_heads": m.llm.kv_heads, "intermediate_size": m.llm.mlp_width, "rope_theta": m.llm.rope_theta,
        },
    )  # fmt: skip
    sam = {key: torch.from_numpy(value.view(np.int16)).view(torch.bfloat16) for key, value in _random(tensors["sam"])}
    torch.save(sam, given["sam"])


def _without_grounding(path: Path, tokens: tuple[str, ...]) -> None:
    """Remove the grounding tokens, as in the tokenizer of Vicuna."""
    values = json.loads(path.read_text())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] not in tokens]
    files.write_json(path, values)


def _copy_and_hash(sources: Path, copy: Path) -> float:
    """Seconds of `cp -r` and `sha256sum` for the same files."""
    shutil.rmtree(copy, ignore_errors=True)
    started = time.monotonic()
    subprocess.run(["cp", "-r", str(sources), str(copy)], check=True)
    paths = [str(file) for file in sorted(copy.rglob("*")) if file.is_file()]
    subprocess.run(["sha256sum", *paths], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    shutil.rmtree(copy)
    return seconds


def _differing(config: Config, given: dict[str, Path], out: Path) -> tuple[list[str], int]:
    """(tensors of the originals that are not bit-identical after exporting the checkpoint, number of compared tensors). Trained
    parameters are stored in float32, in which bf16 values are exact."""
    leaves = LazyParams(out)
    sources = open_sources(given, (), config)
    wrong, counted = [], 0
    for name, source in sources.items():
        shapes = {path: leaf for path, leaf in leaves.shapes.items() if path in source.paths()}
        compared = set()
        for key, value in name_map.export_tensors(leaves, source.rows, source.indices, shapes):
            compared.add(key)
            back = np.empty(value.shape, source.kinds[key][0])
            ops.copy(back, value)
            if back.tobytes() != source[key].tobytes():
                wrong.append(f"{name}: {key}")
        counted += len(compared)
        wrong += [f"{name}: {key} is not in the checkpoint" for key in sorted(source.kinds.keys() - compared)]
    return wrong, counted
