"""`mimo batch`: many requests through one model, into a folder of answers.

Requests are taken in windows of several batches (a whole scan is a window of its own), so that memory is bounded whatever their
number; equal pictures of a window are read and encoded once. A window's files are read while the one before is on the device. A
window is always made from scratch, so that a job that was killed ends with the bytes of one that was not.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mimo_jax.data.images.image import DicomGrid, MedicalImage, Volume, Window, check_window, library
from mimo_jax.data.images.volume import open_scan
from mimo_jax.data.prompt_files import join_prompts, read_prompts
from mimo_jax.data.prompts import Prompts
from mimo_jax.errors import UserError
from mimo_jax.infer.answers.answer import Answer
from mimo_jax.infer.batch.job import BatchJob, disk_errors, write_summary
from mimo_jax.infer.batch.request_files import BatchRequest, BatchRequests
from mimo_jax.infer.engine.requests import EncodedImage, Request, TurnHistory
from mimo_jax.infer.predictor import Mimo
from mimo_jax.infer.volume import VolumeAnswer, ask_volume
from mimo_jax.preemption import StopSignal

SAVED = {".png": None, ".npy": None, ".nii": "nibabel", ".nii.gz": "nibabel", ".dcm": "highdicom"}  # ending -> library
_BATCHES = 4  # of a window
_WINDOW_BYTES = 2**26  # of the files of a window, which unpacked are several times as large
_READERS = 8  # threads that decode files


class Outcome(NamedTuple):
    """done, answered, failed: requests so far, in all runs of the job; an answer whose files cannot all be saved is among both.
    stopped: a signal came before the last. burned_in: pictures and scans of this run that may carry burned-in text."""

    done: int
    answered: int
    failed: int
    stopped: bool
    burned_in: int


class Opened(NamedTuple):
    """A picture or scan, and the prompts of each request on it, in order; or why it cannot be had (a str), each."""

    picture: MedicalImage | Volume | str
    prompts: list[Prompts | str]


def run_batch(
    load: Callable[[], Mimo],
    source: str | os.PathLike,
    out: str | os.PathLike,
    question: str | None = None,
    *,
    frame: int | str | None = None,
    slice: str | None = None,
    series: int | None = None,
    window: Window = None,
    max_new_tokens: int | None = None,
    save: Sequence[str] = (),
    volumes: bool = False,
    resume: bool = False,
) -> Outcome:
    """Ask all requests of `source`, a folder of pictures or a .jsonl or .csv of requests (see `BatchRequests`, which `volumes` is
    for), into the folder `out`.

    load: gives the model; called once all that can be checked without it has been. question, frame, slice, series, window,
    max_new_tokens: for requests that do not say theirs. save: endings of SAVED, of files written for each answer.
    resume: go on with what `out` holds of the same job; without it `out` must be new or empty.
    A request that cannot be asked, or a file that cannot be saved for this picture (a .dcm of a PNG, say), is listed in failed.jsonl
    and costs the others nothing. SIGTERM and SIGINT let the window in
    hand be finished. Raises UserError, before anything is written, for what makes the whole job impossible."""
    check_window(window)
    for ending in save:
        if ending not in SAVED:
            raise UserError(f"{ending}: cannot be saved for each answer; use some of {', '.join(SAVED)}")
        if SAVED[ending]:
            library(SAVED[ending])
    if question is not None and not question.strip():
        raise UserError("question: is empty; ask something, such as 'Segment the liver.'")
    defaults = {"question": question, "frame": frame, "slice": slice, "series": series, "window": window, "max_new_tokens": max_new_tokens}
    requests = BatchRequests(source, out, defaults, volumes)
    survey = requests.survey()
    if survey.faulty == survey.count:
        raise UserError(f"{source}: " + (f"no request can be asked; the first: {survey.first}" if survey.count else "holds no request"))
    job = BatchJob(Path(out), {**defaults, "requests": survey.digest, "count": survey.count, "save": list(save)}, resume)
    burned_in, stopped = 0, False
    if job.done < survey.count:
        mimo = load()
        with job.writing(mimo.origin), StopSignal() as stop, ThreadPoolExecutor(_READERS) as pool, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*burned-in text")  # counted instead
            windows = _windows(requests, job.done, _BATCHES * mimo.config.generate.batch_size)
            with tqdm(total=survey.count, initial=job.done, desc="batch", unit="request", disable=None, smoothing=0.05) as bar:
                for items, opened in _read_ahead(pool, windows):
                    burned_in += _may_be_burned_in(opened)
                    answers, faults = _ask(mimo, items, opened)
                    job.append(*_written(pool, items, answers, faults, job.out, save), len(items))
                    bar.update(len(items))
                    if stop.received:
                        break
            stopped = job.done < survey.count
    if not stopped:
        write_summary(job.out)
    return Outcome(job.done, job.answered, job.failed, stopped, burned_in)


def _windows(requests: BatchRequests, done: int, size: int) -> Iterator[list[BatchRequest]]:
    """At most `size` requests, fewer where their files are large; the same ones every time."""
    window: list[BatchRequest] = []
    files: dict[Path, int] = {}
    for request in itertools.islice(requests, done, None):
        full = len(window) == size or sum(files.values()) > _WINDOW_BYTES
        if window and (request.whole or window[-1].whole or full):
            yield window
            window, files = [], {}
        window.append(request)
        files[request.path] = os.path.getsize(request.path) if os.path.isfile(request.path) else 0
    if window:
        yield window


def _read_ahead(
    pool: ThreadPoolExecutor, windows: Iterator[list[BatchRequest]]
) -> Iterator[tuple[list[BatchRequest], list[tuple[Opened, int] | None]]]:
    """Each window, and for each of its requests what was opened for it with its place there (None for a faulty one); the files of
    the next one are being read meanwhile."""
    ahead = _submit(pool, next(windows, []))
    try:
        while ahead[0]:
            (items, futures, places), ahead = ahead, _submit(pool, next(windows, []))
            yield items, [None if place is None else (futures[place[0]].result(), place[1]) for place in places]
    finally:
        for future in ahead[1].values():
            future.cancel()


def _submit(pool: ThreadPoolExecutor, items: list[BatchRequest]) -> tuple[list[BatchRequest], dict[tuple, Future], list[tuple | None]]:
    """(the window, what will be opened by picture, which picture and place in it each request has)."""
    asked: dict[tuple, list[BatchRequest]] = defaultdict(list)
    places: list[tuple | None] = []
    for item in items:
        key = (item.path, item.frame, item.slice, item.series, item.window)
        places.append(None if item.fault else (key, len(asked[key])))
        if not item.fault:
            asked[key].append(item)
    return items, {key: pool.submit(_open, of) for key, of in asked.items() if of}, places


def _open(items: Sequence[BatchRequest]) -> Opened:
    """The picture or scan that these requests share, read once."""
    one = items[0]
    try:
        picture = open_scan(one.path, frame=one.frame, slice=one.slice, series=one.series, window=one.window)
    except UserError as error:
        return Opened(_line(error), [""] * len(items))
    except OSError as error:
        return Opened(f"{one.path}: {error.strerror}", [""] * len(items))
    if isinstance(picture, Volume):
        single = [not item.prompts and len(item.questions) == 1 for item in items]
        return Opened(picture, [Prompts() if fits else f"{one.path}: a scan takes one question without prompts" for fits in single])
    height, width = picture.pixels.shape[:2]
    prompts: list[Prompts | str] = []
    for item in items:
        try:
            prompts.append(join_prompts(read_prompts(source, height, width, name) for name, source in item.prompts))
        except UserError as error:
            prompts.append(_line(error))
    return Opened(picture, prompts)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _may_be_burned_in(opened: Sequence[tuple[Opened, int] | None]) -> int:
    """How many pictures and scans a DICOM does not say to be free of burned-in text."""
    shown = {id(found[0].picture): found[0].picture for found in opened if found and not isinstance(found[0].picture, str)}
    grids = [p.grids if isinstance(p, Volume) else [p.grid] for p in shown.values()]
    return sum(any(isinstance(g, DicomGrid) and g.dataset.get("BurnedInAnnotation") != "NO" for g in of) for of in grids)


def _ask(
    mimo: Mimo, items: Sequence[BatchRequest], opened: Sequence[tuple[Opened, int] | None]
) -> tuple[list[list[Answer | VolumeAnswer]], dict[int, str]]:
    """(the answers to each request's questions, why those that have none cannot be asked, by their place in the window). All first
    questions run together, then all second ones, each after the answers before; scans one after the other."""
    faults: dict[int, str] = {}
    answers: list[list[Answer | VolumeAnswer]] = [[] for _ in items]
    images: dict[int, MedicalImage | EncodedImage] = {}
    prompts: dict[int, Prompts] = {}
    for i, (item, found) in enumerate(zip(items, opened, strict=True)):
        if found is None:
            faults[i] = item.fault
        elif isinstance(picture := found[0].picture, str):
            faults[i] = picture
        elif isinstance(marked := found[0].prompts[found[1]], str):
            faults[i] = marked
        elif isinstance(picture, Volume):
            try:
                answers[i].append(ask_volume(mimo, picture, item.questions[0], max_new_tokens=item.max_new_tokens))
            except UserError as error:
                faults[i] = _line(error)
        else:
            images[i], prompts[i] = picture, marked

    past: dict[int, list[TurnHistory]] = {i: [] for i in images}
    for turn in range(max((len(item.questions) for item in items), default=0)):
        requests: dict[int, Request] = {}
        for i, image in images.items():
            if turn >= len(items[i].questions) or i in faults:
                continue
            marked = prompts[i] if turn == 0 else Prompts()
            request = Request(image, items[i].questions[turn], marked, items[i].max_new_tokens, tuple(past[i]))
            try:
                mimo.check(request)
            except UserError as error:
                faults[i] = f"turn {turn + 1}: " * bool(turn) + _line(error)
                continue
            requests[i] = request
        if not requests:
            break
        if turn == 0:
            raw = {id(request.image): request.image for request in requests.values()}
            encoded = dict(zip(raw, mimo.encode(list(raw.values())), strict=True))
            images = {i: encoded[id(request.image)] for i, request in requests.items()}
            for i, request in requests.items():
                request.image = images[i]
        for i, (answer, after) in zip(requests, mimo.converse(list(requests.values())), strict=True):
            answers[i].append(answer)
            past[i].append(after)
    return answers, faults


def _written(
    pool: ThreadPoolExecutor,
    items: Sequence[BatchRequest],
    answers: Sequence[Sequence[Answer | VolumeAnswer]],
    faults: dict[int, str],
    out: Path,
    save: Sequence[str],
) -> tuple[list[dict], list[dict]]:
    """(lines of answers.jsonl, lines of failed.jsonl) of a window, after the files of each answer have been saved."""
    files = {
        (i, turn): pool.submit(_save, answer, [out / (items[i].id + f"@{turn + 1}" * bool(turn) + ending) for ending in save])
        for i, given in enumerate(answers)
        for turn, answer in enumerate(given)
        if i not in faults
    }
    lines, failures = [], []
    for i, item in enumerate(items):
        where = {"id": item.id, "file": item.image} | ({} if item.line is None else {"line": item.line})
        if i in faults:
            failures.append({**where, "reason": faults[i]})
            continue
        turns = []
        for turn, answer in enumerate(answers[i]):
            names, refused = files[i, turn].result()
            failures += [{**where, "reason": reason} for reason in refused]
            turns.append({"question": answer.question, **answer.to_json(), **({"files": names} if save else {})})
        lines.append({"id": item.id, "image": item.image, **({"turns": turns} if item.several else turns[0])})
    return lines, failures


def _save(answer: Answer | VolumeAnswer, paths: Sequence[Path]) -> tuple[list[str], list[str]]:
    """(names of the files written, why others were not). A DICOM SEG of nothing is not allowed, and not missed."""
    names, refused = [], []
    painted = answer.painted() if isinstance(answer, VolumeAnswer) else [e for e in answer.entities if e.area_px]
    for path in paths:
        if path.suffix == ".dcm" and not painted:
            continue
        with disk_errors(path):
            try:
                answer.save(path)
                names.append(path.name)
            except UserError as error:
                refused.append(_line(error))
    return names, refused
