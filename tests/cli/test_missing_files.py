"""A file that a command needs and cannot have: one line that names it and code 2, wherever the path was written."""

import contextlib
import ctypes
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from mimo_jax.cli import main
from mimo_jax.data.builder.phantom_set import build_phantoms
from mimo_jax.infer.answers.calibration import Calibration

CONFIG = """from mimo_jax.config import SourceConfig
from tests.tiny_config import quick_config


def get_config():
    config = quick_config()
    config.train.steps = 1
    config.data.sources = {"set": SourceConfig(path="data")}
    LINE
    return config
"""
LINES = {
    "config.py": "",
    "tokenizer.py": "config.tokenizer = 'tokenizer.json'",
    "init.py": "config.init.path = 'run'",
    "manifest.py": "config.data.sources['set'].path, config.train.max_bad_samples = 'manifest', 0.0",
    "features.py": "config.init.path, config.data.features = 'run', True",
}
TRAIN, TOKENIZER, INIT, MANIFEST, FEATURES = (f"train --config {name} --workdir new" for name in LINES)
EVAL = "eval --checkpoint run --data data --split test --out report.json --limit 1"
ASK = "ask --checkpoint run picture.png What?"
BATCH = "batch --checkpoint run --in requests.jsonl --out answers"
BUILD = "data build --source manifest --in manifest --out built --workers 1"
IMPORT = "convert import --config config.py --llm weights --out imported"
INSPECT = "convert inspect weights"
SWEEP = "sweep --config sweep.py --data data --workdir sweep --dry-run"

# (what is broken, the command, words of the answer; without them, the name of what is broken)
CASES = [
    # named by the command line
    ("config.py", TRAIN, None),
    ("config.py", "compile --config config.py --topology cpu:1 --batch-per-chip 1", None),
    ("sweep.py", SWEEP, None),
    ("config.py", f"{SWEEP} --base-config config.py", None),
    ("run", EVAL, None),
    ("data", EVAL, None),
    ("picture.png", ASK, None),
    ("prompts.json", f"{ASK} --prompts prompts.json", None),
    ("mask.png", f"{ASK} --prompts mask.png", None),
    ("requests.jsonl", BATCH, None),
    ("keys.json", f"{INSPECT} --key-map keys.json", None),
    ("weights", INSPECT, None),
    # named by a field of the config alone
    ("data", TRAIN, "config.data.sources.set: "),
    ("manifest", MANIFEST, "config.data.sources.set: "),
    ("tokenizer.json", TOKENIZER, "config.tokenizer: tokenizer.json"),
    ("run", INIT, "config.init.path: "),
    ("tokenizer.json", IMPORT.replace("config.py", "tokenizer.py"), "tokenizer.json"),
    ("data", "profile --workdir run", "config.data.sources.set: "),
    # files of a folder that is named
    *[(f"run/{name}", INIT, "config.init.path: ") for name in ("config.json", "tokenizer.json", "base.json", "base/manifest.json")],
    *[(f"run/{name}", INIT, "config.init.path: ") for name in ("steps/1/manifest.json", "steps/1/extra.json")],
    ("run/provenance.json", INIT, None),
    *[(f"run/{name}", ASK, None) for name in ("config.json", "tokenizer.json", "base.json", "steps/1/calibration.json")],
    ("run/steps/1/manifest.json", ASK, "/run"),
    ("run/base/manifest.json", ASK, "run/base"),
    ("data/dataset_info.json", TRAIN, None),
    ("data/train.index.npz", TRAIN, None),
    ("data/train.samples.array_record", TRAIN, None),
    ("data/train-00000-of-00001.array_record", TRAIN, None),
    ("data/features", FEATURES, "features"),
    ("data/features/*/*.json", FEATURES, "features"),
    ("data/features/*/*.npy", FEATURES, None),
    ("data/dataset_info.json", "data merge data --out all", None),
    ("data/dataset_info.json", "data stats data", None),
    ("manifest/manifest.jsonl", MANIFEST, "manifest"),
    ("manifest/manifest.jsonl", BUILD, "manifest"),
    ("weights/config.json", IMPORT, None),
    ("weights/tokenizer.json", IMPORT, None),
    # named by another file
    ("manifest/0.png", MANIFEST, None),
    ("manifest/0_mask.png", MANIFEST, None),
    ("manifest/0.png", BUILD, None),
    ("manifest/0_mask.png", BUILD, None),
    ("picture.png", BATCH, None),
    ("mask.png", BATCH, None),
    ("prompts.json", BATCH, None),
    ("weights/a.safetensors", INSPECT, None),
    ("weights/model.safetensors.index.json", INSPECT, None),
]
KINDS = ("absent", "of the other kind", "empty", "unreadable")
WITHOUT = {  # how the command does without it
    ("run/steps/1/calibration.json", "absent"),
    ("run/provenance.json", "absent"),
    *((f"weights/{name}", how) for name in ("config.json", "model.safetensors.index.json") for how in KINDS[:2]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder in which every command of the table does what it should."""
    home = tmp_path_factory.mktemp("home")
    for name, line in LINES.items():
        (home / name).write_text(CONFIG.replace("LINE", line))
    (home / "sweep.py").write_text("from configs.ablations import BASE, get_ablations\n")
    with contextlib.chdir(home):
        build_phantoms("data", 24, seed=5, progress=False)
        assert main.main("train --config config.py --workdir run".split()) == 0
        assert main.main("data encode --checkpoint run --data data".split()) == 0
    shutil.copy(home / "run" / "tokenizer.json", home)
    base = json.loads((home / "run" / "base.json").read_text())
    (home / "run" / "base.json").write_text(json.dumps(base | {"path": "moved"}))  # it is found beside it
    (home / "run" / "provenance.json").write_text('{"sources": {}, "untrained": []}')
    Calibration((1.0,) * 4, (0.0, 1.0), (0.0, 1.0)).write(home / "run" / "steps" / "1" / "calibration.json")
    _write_manifest(home / "manifest")
    pixels, mask = np.full((32, 40, 3), 90, np.uint8), np.zeros((32, 40), bool)
    mask[8:20, 8:20] = True
    Image.fromarray(pixels).save(home / "picture.png")
    Image.fromarray(mask).save(home / "mask.png")
    (home / "prompts.json").write_text('{"points": [[5, 6]]}')
    request = {"image": "picture.png", "question": "What?", "mask": "mask.png", "prompts": "prompts.json"}
    (home / "requests.jsonl").write_text(json.dumps(request) + "\n")
    _write_weights(home / "weights")
    (home / "keys.json").write_text("[]")
    return home


def _write_manifest(folder: Path) -> None:
    folder.mkdir()
    lines = []
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        Image.fromarray(pixels[..., 0] > 128).save(folder / f"{i}_mask.png")
        masks = [{"file": f"{i}_mask.png", "entity": "liver"}]
        lines.append({"id": str(i), "image": f"{i}.png", "masks": masks, "modality": "CT", "group": str(i)})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_weights(folder: Path) -> None:
    """The outline of a language model whose head is its embedding."""
    folder.mkdir()
    layer = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    layer += ["input_layernorm", "post_attention_layernorm"]
    names = ["model.embed_tokens", "model.norm", *(f"model.layers.{i}.{name}" for i in range(2) for name in layer)]
    save_file({f"{name}.weight": np.zeros((2, 2), np.float32) for name in names}, folder / "a.safetensors")
    homes = {f"{name}.weight": "a.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')


@contextlib.contextmanager
def _without_override():
    """Let this thread, and those that it starts, obey the permissions of files, as those of any user but root do. ArrayRecord's threads,
    which a test before may have started, are not reached: its files are not among the unreadable ones."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface; this thread
    before = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable; then the same of capabilities from 32 on
    assert libc.capget(header, before) == 0
    dropped = (ctypes.c_uint32 * 6)(*before)
    dropped[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, dropped) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


def _break(path: Path, how: str) -> None:
    folder = path.is_dir()
    if how == "unreadable":
        path.chmod(0)
        return
    shutil.rmtree(path) if folder else path.unlink()
    if how == "of the other kind" and folder or how == "empty" and not folder:
        path.touch()
    elif how != "absent":
        path.mkdir()


@pytest.mark.parametrize(
    ("broken", "line", "words", "how"),
    [
        (*case, how)
        for case in CASES
        for how in KINDS
        if (case[0], how) not in WITHOUT and not (how == "unreadable" and case[0].endswith("array_record"))
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(whole, tmp_path, monkeypatch, capfd, broken, line, words, how):
    for path in whole.iterdir():
        if path.name == broken.split("/")[0]:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
        else:
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    target = min(Path().glob(broken))
    _break(target, how)
    with _without_override() if how == "unreadable" else contextlib.nullcontext():
        code = main.main(line.split())
    told = capfd.readouterr().err.splitlines()[-1]
    if code == 3 and line == BATCH:  # what only opening it shows is a request's failure, not the command's
        assert target.name in Path("answers/failed.jsonl").read_text() and "answers/failed.jsonl" in told
    else:
        assert code == 2 and told.startswith("mimo: error: ") and (words or target.name) in told
