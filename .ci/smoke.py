"""One check of an installed mimo_jax, in the current folder: imports, help, data, train, resume, ask or export."""

import importlib.util
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

CONFIG = """
from configs import tiny

def get_config():
    config = tiny.get_config()
    model = config.model
    model.vision.layers = model.llm.layers = model.sam.layers = 2
    model.vision.width = model.aligner.width = model.llm.width = model.sam.width = 32
    config.data.batch_size, config.data.samples_per_image, config.data.buckets = 4, 2, "128"
    config.train.checkpoint_every, config.train.eval_samples = 1, 0
    config.generate.max_new_tokens, config.generate.batch_size = 8, 2
    return config
"""


def mimo(*arguments: str) -> str:
    """Output of a `mimo` command that must end well."""
    command = [str(Path(sys.executable).parent / "mimo"), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}"
    return done.stdout


def imports() -> None:
    assert importlib.util.find_spec("torch") is None, "torch came along"
    import mimo_jax

    assert Path(mimo_jax.__file__).is_relative_to(sys.prefix), f"{mimo_jax.__file__} is not what was installed"
    for module in pkgutil.walk_packages(mimo_jax.__path__, "mimo_jax."):
        importlib.import_module(module.name)
    assert "transformers" not in sys.modules


def help() -> None:
    for command in ("", "train", "eval", "ask", "chat", "batch", "data", "data phantom", "convert", "convert import"):
        assert "usage: mimo" in mimo(*command.split(), "--help")


def data() -> None:
    mimo("data", "phantom", "--out", "phantom", "--images", "24", "--seed", "0", "--workers", "1")


def train(steps: int = 2) -> str:
    Path("smallest.py").write_text(CONFIG)
    return mimo("train", "--config", "smallest.py", "--data", "phantom", "--workdir", "run", f"--config.train.steps={steps}")


def resume() -> None:
    assert "resuming at step 2" in train(steps=3)


def ask() -> None:
    from mimo_jax.data.records import RecordFolder

    record = RecordFolder("phantom", "test")[0]
    image = f"image.{record.format}"
    Path(image).write_bytes(record.image)
    question = ["ask", "--checkpoint", "run", image, "What is this?", "--box", "5,5,40,40"]
    mimo(*question, "--out", "overlay.png")
    assert Path("overlay.png").stat().st_size > 0
    assert "entities" in json.loads(mimo(*question, "--json").splitlines()[-1])
    Path("films").mkdir()
    Path("films", image).write_bytes(record.image)
    mimo("batch", "--checkpoint", "run", "--in", "films", "--question", "What is this?", "--out", "answers", "--save", ".png")
    assert len(Path("answers/answers.jsonl").read_text().splitlines()) == 1 and Path("answers/summary.csv").is_file()


def export() -> None:
    """One directory that needs no other, and answers."""
    mimo("convert", "export", "--checkpoint", "run", "--format", "mimo", "--out", "whole")
    Path("run").rename("away")
    image = next(Path().glob("image.*"))
    assert "entities" in json.loads(mimo("ask", "--checkpoint", "whole", str(image), "What is this?", "--json").splitlines()[-1])


if __name__ == "__main__":
    {"imports": imports, "help": help, "data": data, "train": train, "resume": resume, "ask": ask, "export": export}[sys.argv[1]]()
