"""The command line: help, flags, exit codes. What the commands do is tested where it is done."""

import json
import shlex
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimo_jax import __version__
from mimo_jax.cli import arg_types, main
from mimo_jax.data.images import volume
from mimo_jax.data.images.image import MedicalImage
from mimo_jax.data.images.volume import open_scan
from mimo_jax.errors import UserError
from mimo_jax.infer.answers.answer import Answer, Entity
from mimo_jax.infer.answers.calibration import UNCALIBRATED, ConfidenceFeatures
from mimo_jax.infer.batch.run_batch import BatchResult
from tests.data.medical_files import dicom, saved, series

COMMANDS = [
    "train",
    "sweep",
    "eval",
    "eval compare",
    "ask",
    "chat",
    "batch",
    "data",
    "data phantom",
    *[f"data {verb}" for verb in ("build", "merge", "split", "stats", "validate", "view")],
]


@pytest.fixture
def called(monkeypatch):
    """The functions behind the commands, replaced: what they were called with, and what they return or raise."""
    record = types.SimpleNamespace(calls=[], result=0, error=None)

    def stand_in(module: str, name: str, result=None):
        def function(*args, **kwargs):
            record.calls.append((name, args, kwargs))
            if record.error:
                raise record.error
            return record.result if result is None else result

        made = types.ModuleType(module)
        setattr(made, name, function)
        monkeypatch.setitem(sys.modules, module, made)

    stand_in("mimo_jax.train.loop", "train")
    stand_in("mimo_jax.eval.evaluate", "evaluate_checkpoint", {})
    stand_in("mimo_jax.eval.calibrate", "calibrate_checkpoint", {})
    split = {"records": 8, "masks": 9, "samples": 10, "perspectives": {"I": 10}}
    stand_in("mimo_jax.data.builder.phantom_set", "build_phantoms", {"splits": {"train": split}})
    return record


SURE = ConfidenceFeatures(0.8, 1.0, 1.0, 1.0)


class FakeAnswer:
    entities = [
        Entity(0, "liver", "liver", np.zeros((0, 0), bool), [1, 2, 3, 4], 12, None, iou=0.5, score=0.25, uncertain=True, evidence=SURE)
    ]

    def describe(self):
        return "The liver is outlined."

    def to_json(self):
        return {"text": "The liver is outlined."}

    def save(self, *paths):
        for path in paths:
            Path(path).write_text("picture")


@pytest.fixture
def asked(monkeypatch):
    """`Mimo` and `open_scan`, replaced: what they were loaded, opened and asked with."""
    record = {}

    def opened(image, **chosen):
        record.update(image=image, **chosen)
        return MedicalImage(np.zeros((8, 9, 3), np.uint8))

    class FakeMimo:
        @classmethod
        def load(cls, checkpoint, base=None, allow_untrained=False, quantization=""):
            record.update(checkpoint=checkpoint, base=base, allow_untrained=allow_untrained, quantization=quantization)
            made = cls()
            made.origin = "base 1234"
            return made

        config = types.SimpleNamespace(generate=types.SimpleNamespace(refine=False, sam_prompts=False))

        def open(self, image):
            record.update(vars(self.config.generate))
            assert isinstance(image, MedicalImage)
            return self

        def ask(self, question, **prompts):
            record.update(question=question, **prompts)
            return FakeAnswer()

    module = types.ModuleType("mimo_jax.infer.predictor")
    module.Mimo = FakeMimo
    monkeypatch.setitem(sys.modules, "mimo_jax.infer.predictor", module)
    monkeypatch.setattr(volume, "open_scan", opened)
    return record


def fails(capsys, *argv: str) -> str:
    """The one line that a user's mistake is answered with."""
    assert main.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mimo: error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_of_every_command_shows_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: mimo {command}".strip() in text
    assert command == "data" or f"  mimo {command}" in text.split("examples:")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_parse(command):
    for line in main._command(main.parser(), command.split()).format_help().split("examples:")[-1].splitlines():
        if line.startswith("  mimo "):
            words = shlex.split(line.split(" < ")[0])[1:]
            assert main._parse(main._join_negative_values(words)).command == command.split()[0]


def test_version(capsys):
    with pytest.raises(SystemExit):
        main.main(["--version"])
    assert capsys.readouterr().out == f"mimo_jax {__version__}\n"


def test_help_loads_no_jax():
    code = "import sys; from mimo_jax.cli import main; main.parser().format_help(); print('jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        ("", "COMMAND"),
        ("trian", "invalid choice: 'trian'"),
        ("train --config tiny", "--workdir"),
        ("train --config tiny --wrkdir w", "--wrkdir: is unknown; did you mean --workdir?"),
        ("eval --chekpoint c --data d --out o", "--chekpoint: is unknown; did you mean --checkpoint?"),
        ("eval --checkpoint c --data d --out o --config.train.steps=3", "--config.train.steps: is unknown"),
        ("eval --checkpoint c --data d --out o --limit 0", "--limit: '0' is not a whole number of 1 or more"),
        ("eval --checkpoint c --data d --out o --split dev", "invalid choice: 'dev'"),
        ("eval --checkpoint c --data d", "--out: is missing"),
        ("eval --checkpoint c --data d --out o --sam-box --overlays v", "--overlays: does not apply to --sam-box"),
        ("eval --data d --out o", "--checkpoint: is missing"),
        ("eval --checkpoint c --out o", "--data: is missing"),
        ("eval compare a.json", "the following arguments are required: B.json"),
        ("eval compare a.json b.json", "a.json: no such file"),
        ("eval --checkpoint c --data d --out o --calibrate", "--out: --calibrate writes no report"),
        ("ask --checkpoint c i.png", "IMAGE and QUESTION are missing"),
        ("ask --checkpoint c i.png q --quantize int3", "invalid choice: 'int3'"),
        ("ask --checkpoint c i.png q more", "'more': is an unexpected argument"),
        ("ask --checkpoint c i.png q --box 1,2,3", "'1,2,3' is not X0,Y0,X1,Y1 such as 10,12,40,44"),
        ("ask --checkpoint c i.png q --point 1", "'1' is not X,Y,LABEL such as 31,40,1"),
        ("ask --checkpoint c i.png q --scribble 1,2,3", "'1,2,3' is not X,Y pairs"),
        ("ask --checkpoint c i.png q --frame -1", "'-1' is not a whole number of 0 or more"),
        ("ask --checkpoint c i.png q --window -5,3,1", "'-5,3,1' is not LOW,HIGH such as -160,240, or a name such as lung"),
        ("ask --checkpoint c i.png q --window liver", "window liver: is unknown; give LOW,HIGH or one of lung, bone"),
        ("ask --checkpoint c i.png q --window 3,3", "window 3,3: give two numbers LOW,HIGH with LOW < HIGH"),
        ("ask --checkpoint c gone.png q", "gone.png: No such file"),
        ("batch --checkpoint c --out o", "--in"),
        ("batch --checkpoint c --in gone --out o --question q", "gone: no such file or folder"),
        ("batch --checkpoint c --in gone --out o --save gif", ".gif: cannot be saved for each answer"),
        ("train --config tiny --workdir w --config.train.stesp=5", "config.train.stesp: is unknown; did you mean config.train.steps?"),
        ("train --config tiny --workdir w --config.train.steps", "--config.train.steps"),
        ("train --config gone.py --workdir w", "--config gone.py: no such file"),
        ("train --config tiny --workdir w --data a/x --data b/x", "a second dataset named x"),
        ("train --config tiny --workdir w --data =x", "write --data DIR or --data NAME=DIR"),
        ("train --config tiny --workdir gs://b/w", "gs://b is not mounted; run gcsfuse --implicit-dirs b /gcs/b, then this"),
        ("train --config tiny --workdir w --data x=s3://b/d", "x=s3://b/d: s3 is not read directly; mount b and name the folder"),
    ],
)
def test_a_wrong_line_is_answered_with_one_line_and_code_2(argv, answer, capsys, called):
    assert answer in fails(capsys, *argv.split())
    assert not called.calls, "nothing is done"


def test_train_hands_over_config_workdir_data_init_and_overrides(called, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    called.result = 75
    line = "train --config configs/tiny_lora.py --init runs/a --data my_data --data x=y.jsonl --workdir w --config.train.steps 5"
    assert main.main([*line.split(), "--config.data.sources.x.weight=3"]) == 75
    ((name, (config, workdir), _),) = called.calls
    assert (name, workdir, config.train.steps, config.init.path) == ("train", "w", 5, "runs/a")
    assert {n: (s.path, s.weight) for n, s in config.data.sources.items()} == {
        "my_data": (str(tmp_path / "my_data"), 1.0),
        "x": (str(tmp_path / "y.jsonl"), 3.0),
    }


def test_a_mounted_bucket_goes_by_its_own_name(called, tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(arg_types, "_BUCKETS", tmp_path)
    line = "train --config configs/tiny.py --data x=gs://b/data --workdir gs://b/runs/a --config.init.path=gs://b/import"
    assert main.main(line.split()) == 0
    ((_, (config, workdir), _),) = called.calls
    assert (workdir, config.init.path) == (f"{tmp_path}/b/runs/a", f"{tmp_path}/b/import")
    assert config.data.sources["x"].path == f"{tmp_path}/b/data"


def test_eval_and_phantom_hand_over_their_flags(called, capsys):
    line = "eval --checkpoint c --data d --split val --out o --limit 3 --overlays v --quantize int4 --baselines-from t"
    assert main.main(line.split()) == 0
    assert main.main("eval --checkpoint c --data d --calibrate --base b".split()) == 0
    assert main.main("data phantom --out d --images 8 --seed 2 --workers 1".split()) == 0
    assert called.calls == [
        (
            "evaluate_checkpoint",
            ("c", "d", "val", "o"),
            {"limit": 3, "overlays": "v", "base": None, "allow_untrained": False, "quantization": "int4", "baselines_from": "t"},
        ),
        ("calibrate_checkpoint", ("c", "d", "val"), {"limit": None, "base": "b", "allow_untrained": False}),
        ("build_phantoms", ("d", 8, 2), {"workers": 1}),
    ]
    assert "d train: 8 images, 9 masks, 10 samples (I 10)" in capsys.readouterr().out


def test_ask_hands_over_prompts_of_every_kind(asked, capsys, tmp_path, monkeypatch):
    out, other = tmp_path / "overlay.png", tmp_path / "answer.json"
    argv = ["ask", "--checkpoint", "c", "i.png", "Which?", "--base", "b", "--allow-untrained", "--quantize", "int8", "--refine"]
    Image.fromarray(np.eye(8, 9, dtype=bool)).save(tmp_path / "mask.png")
    (tmp_path / "more.json").write_text('{"points": [[5, 6]], "boxes": [[1, 1, 2, 2]]}')
    argv += ["--point", "-0.5,2.5,0", "--point", "3,4", "--max-new-tokens", "9"]
    argv += ["--prompts", str(tmp_path / "mask.png"), "--prompts", str(tmp_path / "more.json")]
    argv += ["--frame", "3", "--slice", "k:4", "--window", "-160,240", "--out", str(out), "--out", str(other)]
    assert main.main([*argv, "--box", "0,2,3,4", "--scribble", "1,2 3,4", "--scribble", "5,6"]) == 0
    *strokes, painted = [scribble.tolist() for scribble in asked.pop("scribbles")]
    assert strokes == [[[1, 2], [3, 4]], [[5, 6]]] and len(painted) > 2 and all(x == y for x, y in painted)
    asked |= {name: asked[name].tolist() for name in ("points", "boxes")}
    assert asked == {
        **{
            "checkpoint": "c",
            "base": "b",
            "allow_untrained": True,
            "refine": True,
            "sam_prompts": False,
            "quantization": "int8",
            "image": "i.png",
            "question": "Which?",
            "max_new_tokens": 9,
        },
        **{"frame": 3, "slice": "k:4", "series": None, "window": (-160.0, 240.0)},
        "points": [[-0.5, 2.5, 0.0], [3.0, 4.0, 1.0], [5.0, 6.0, 1.0]],
        "boxes": [[0.0, 2.0, 3.0, 4.0], [1.0, 1.0, 2.0, 2.0]],
    }
    assert out.read_text() == other.read_text() == "picture"
    said = capsys.readouterr()
    assert said.out.splitlines() == ["The liver is outlined.", "  liver: 12 px, box [1, 2, 3, 4], score 0.25, uncertain"]
    assert said.err.splitlines() == ["base 1234, refine", "device: 1 × cpu", "answering", f"written to {out}, {other}"]
    assert main.main(["ask", "--checkpoint", "c", "i.png", "Which?", "--window", "lung"]) == 0 and asked["window"] == "lung"
    monkeypatch.setattr(FakeAnswer.entities[0], "area_mm2", 7.06)
    assert main.main(["ask", "--checkpoint", "c", "i.png", "Which?"]) == 0
    assert "  liver: 12 px, 7.1 mm², box" in capsys.readouterr().out


@pytest.mark.parametrize(
    "out, error",
    [
        ("a.gz.gif", "has an unknown ending"),
        ("a.nii.gz", "only NIfTI and DICOM input"),
        ("a.dcm", "only DICOM input"),
        ("no/a.png", "no folder"),
    ],
)
def test_ask_refuses_outputs_before_a_model_is_loaded(asked, capsys, out, error):
    assert error in fails(capsys, "ask", "--checkpoint", "c", "i.png", "Which?", "--out", "b.json", "--out", out)
    assert "checkpoint" not in asked


def test_a_warning_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("warnings.formatwarning", main._format_warning)
    Image.fromarray(np.arange(72, dtype=np.uint16).reshape(8, 9) * 50).save(tmp_path / "deep.png")
    assert main.main(["ask", "--checkpoint", "none", str(tmp_path / "deep.png"), "What?"]) == 2
    said = warnings.formatwarning("values of more than 8 bits", UserWarning, "file.py", 3)
    assert said == "mimo: warning: values of more than 8 bits\n"
    assert "file.py:3: DeprecationWarning" in warnings.formatwarning("old", DeprecationWarning, "file.py", 3, "")


def test_ask_refuses_before_a_model_is_loaded_what_it_cannot_ask_about(capsys, tmp_path):
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / "i.png")
    ask = ["ask", "--checkpoint", "none"]
    assert "question: is empty" in fails(capsys, *ask, str(tmp_path / "i.png"), "  ")
    assert "https://host/i.png: is a URL; download the file first" in fails(capsys, *ask, "https://host/i.png", "What?")
    said = fails(capsys, *ask, str(tmp_path), "What?")
    assert f"(1 not DICOM); give the folder of one series, or ask about a folder of pictures with mimo batch --in {tmp_path}" in said
    ids = np.kron(np.arange(20, dtype=np.uint8).reshape(4, 5), np.ones((2, 2), np.uint8))[:8, :9]
    Image.fromarray(ids).save(tmp_path / "ids.jpg", quality=95)
    said = fails(capsys, *ask, str(tmp_path / "i.png"), "What?", "--prompts", str(tmp_path / "ids.jpg"))
    assert "ids.jpg: has" in said and "--mask-threshold" in said
    assert main.main([*ask, str(tmp_path / "i.png"), "What?", "--prompts", str(tmp_path / "ids.jpg"), "--mask-threshold", "1"]) == 2
    assert "none: does not exist" in capsys.readouterr().err
    assert "is not a number above 0" in fails(capsys, *ask, "i.png", "What?", "--mask-threshold", "0")


def test_ask_refuses_prompts_before_a_model_is_loaded(asked, capsys, tmp_path):
    (tmp_path / "far.json").write_text('{"points": [[50, 6]]}')
    for flag, value, says in (
        ("--prompts", f"{tmp_path}/far.json", "far.json: point 0: (50, 6) is outside the image of 9x8 pixels"),
        ("--prompts", f"{tmp_path}/gone.json", "gone.json: No such file"),
        ("--box", "1,2,99,4", "box 0 [1, 2, 99, 4) exceeds the image of 9x8 pixels"),
    ):
        assert says in fails(capsys, "ask", "--checkpoint", "c", "i.png", "Which?", flag, value)
    assert "checkpoint" not in asked


def test_batch_hands_over_its_flags_and_says_how_it_ended(monkeypatch, capsys):
    ends, calls = [(9, 9, 0, False, 0), (9, 7, 2, False, 3), (4, 4, 0, True, 0)], []

    def run_batch(load, source, out, question, **options):
        calls.append((source, out, question, options))
        return BatchResult(*ends[len(calls) - 1], {"transparent pixels": 2})

    monkeypatch.setattr("mimo_jax.infer.batch.run_batch.run_batch", run_batch)
    line = ["batch", "--checkpoint", "c", "--in", "films", "--question", "Which?", "--out", "o"]
    flags = "--save png,.NII.gz --resume --volumes --window -5,6 --frame all --series 2 --max-new-tokens 9 --mask-threshold 128"
    assert main.main([*line, *flags.split()]) == 0
    assert "9 answers in o" in capsys.readouterr().out
    assert main.main(line) == 3
    said = capsys.readouterr().err
    assert "2 requests failed at least in part; see the reasons in o/failed.jsonl" in said and "3 images may contain burned-in text" in said
    assert "2 images: transparent pixels;" in said
    assert main.main(line) == 75
    assert "stopped after 4 requests; run the same command with --resume" in capsys.readouterr().err
    options = {"save": [".png", ".nii.gz"], "resume": True, "volumes": True, "window": (-5, 6), "frame": "all", "series": 2}
    options |= {"max_new_tokens": 9, "slice": None, "mask_threshold": 128.0}
    assert calls[0] == ("films", "o", "Which?", options)
    assert calls[1][3] == {**dict.fromkeys(options), "save": [], "resume": False, "volumes": False}


def test_ask_never_overwrites_its_image(asked, capsys, tmp_path):
    image = tmp_path / "i.png"
    image.write_text("scan")
    assert "is the image itself" in fails(capsys, "ask", "--checkpoint", "c", str(image), "Which?", "--out", f"{tmp_path}/./i.png")
    assert image.read_text() == "scan" and "checkpoint" not in asked


def test_ask_prints_json_alone(asked, capsys):
    assert main.main(["ask", "--checkpoint", "c", "i.png", "Which?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": "The liver is outlined."}


@pytest.fixture
def scanned(asked, monkeypatch):
    """Real scans, and a `Mimo` that paints what is bright."""
    monkeypatch.setattr(volume, "open_scan", open_scan)
    made = sys.modules["mimo_jax.infer.predictor"].Mimo
    made.config = types.SimpleNamespace(generate=types.SimpleNamespace(batch_size=2))
    made.calibration = UNCALIBRATED
    made.check = lambda self, request: None

    def predict(self, requests):
        masks = [request.image.pixels[..., 0] > 100 for request in requests]
        entities = [[Entity.of(0, "the liver", mask, SURE)] * bool(mask.any()) for mask in masks]
        return [Answer("Here.", [], e, False, r.question, r.image.pixels, ()) for e, r in zip(entities, requests, strict=True)]

    made.predict = predict
    return asked


def slices():
    """Bright in the upper four rows of slices 1 and 2 of 4."""
    made = np.zeros((4, 8, 10), np.uint16)
    made[1:3, :4] = 200
    return made


def test_ask_of_a_folder_asks_every_slice(scanned, capsys, tmp_path):
    series(tmp_path / "s", slices())
    outs = [tmp_path / name for name in ("b.nii.gz", "b.dcm", "b.json", "b.png")]
    argv = ["ask", "--checkpoint", "c", str(tmp_path / "s"), "Segment the liver.", "--window", "0,255"]
    assert main.main([*argv, *(f"--out={out}" for out in outs)]) == 0
    said = capsys.readouterr()
    # 2 slices of 4 rows of 10 pixels of 0.5 x 0.25 x 2 mm
    assert said.out.splitlines() == ["the liver: 80 voxels, 0.02 cm³, slices 1 to 2, score 0.80", "nothing segmented on 2 of 4 slices"]
    assert "base 1234" in said.err and f"written to {outs[0]}" in said.err and all(out.is_file() for out in outs)
    assert main.main([*argv, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(outs[2].read_text()) and printed["structures"][0]["volume_mm3"] == 20
    path = saved(dicom(slices(), frames=4), tmp_path / "a")
    assert main.main(["ask", "--checkpoint", "c", str(path), "?", "--frame", "all", "--window", "0,255"]) == 0
    assert capsys.readouterr().out.startswith("the liver: 80 voxels, slices 1 to 2, score 0.80\n")


def test_ask_of_a_scan_says_what_is_wrong_before_a_model_is_loaded(scanned, capsys, tmp_path):
    folder = tmp_path / "s"
    paths = series(folder, slices())
    argv = ["ask", "--checkpoint", "c", str(folder), "?"]
    assert "--prompts need a single slice; choose one, such as --slice 30" in fails(capsys, *argv, "--point", "1,2")
    assert "is in the folder of the images" in fails(
        capsys, *argv, "--out", str(saved(dicom(slices()[0], Modality="SEG"), folder / "b.dcm"))
    )
    assert "'x' is not a whole number" in fails(capsys, *argv, "--frame", "x")
    assert "series 2 does not exist; it has 1" in fails(capsys, *argv, "--series", "2")
    saved(dicom(slices()[0]), folder / "another")
    assert main.main(argv) == 2
    listed = capsys.readouterr().err.splitlines()
    assert "has 2 series, sizes or directions" in listed[0] and listed[1:] == ["  1: 4 images, CT, 10x8", "  2: 1 image, CT, 10x8"]
    assert "checkpoint" not in scanned and len(paths) == 4


def test_exit_codes(called, capsys):
    line = ["train", "--config", "tiny", "--workdir", "w"]
    called.error = UserError("config.x: is wrong;\nmend it")
    assert fails(capsys, *line) == "mimo: error: config.x: is wrong; mend it\n"
    called.error = OSError(28, "No space left on device")
    assert fails(capsys, *line) == "mimo: error: No space left on device; make room\n"
    called.error = FileNotFoundError(2, "No such file or directory", "w")
    assert fails(capsys, *line) == "mimo: error: w: No such file or directory; check the path\n"
    for gone in ("vocabulary.json", "w/state.json"):  # nobody named it: a file of the package, and one of our own in a named folder
        called.error = FileNotFoundError(2, "No such file or directory", gone)
        with pytest.raises(FileNotFoundError):
            main.main(line)
    called.error = FileNotFoundError(2, "No such file or directory", "d/train.index")
    assert "d/train.index" in fails(capsys, *"eval --checkpoint c --data d --out o".split())
    called.error = KeyboardInterrupt()
    assert main.main(line) == 130
    called.error = ValueError("ours")
    with pytest.raises(ValueError, match="ours"):  # the interpreter prints the traceback and exits with 1
        main.main(line)


def test_a_real_process_shows_a_traceback_only_where_the_fault_is_ours(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "i.png")
    run = [sys.executable, "-m", "mimo_jax.cli", "ask", "--checkpoint", str(tmp_path), str(tmp_path / "i.png"), "q"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith(f"mimo: error: {tmp_path}: is not a checkpoint") and done.stderr.count("\n") == 1
    code = "import sys; from mimo_jax.cli import main; main._parse = lambda argv: 1 / 0; sys.exit(main.main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr
