"""`mimo batch`: answer many requests with one model, into an output folder.

Requests are processed in windows of several batches (a volume is its own window), so that memory is bounded whatever their number; an
image that occurs several times in a window is read and encoded once. The files of the next window are read while the current one is on
the device. A window is always computed from scratch, so that the output of a job that was killed and resumed is byte-identical to that
of an uninterrupted one.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mimo_jax.data.conversation import check_question
from mimo_jax.data.images.image import DicomGrid, MedicalImage, Volume, Window, check_window, import_medical
from mimo_jax.data.images.volume import open_scan
from mimo_jax.data.prompt_files import join_prompts, read_prompts
from mimo_jax.data.prompts import Prompts
from mimo_jax.data.transforms import CHOICES
from mimo_jax.errors import UserError
from mimo_jax.infer.answers.answer import Answer
from mimo_jax.infer.batch.job import BatchJob, disk_errors
from mimo_jax.infer.batch.request_files import BatchRequest, BatchRequests
from mimo_jax.infer.engine.requests import EncodedImage, Request, TurnHistory
from mimo_jax.infer.predictor import Mimo
from mimo_jax.infer.volume import VolumeAnswer, ask_volume
from mimo_jax.preemption import StopSignal

SAVED = {".png": None, ".npy": None, ".nii": "nibabel", ".nii.gz": "nibabel", ".dcm": "highdicom"}  # ending -> library
_BATCHES_PER_WINDOW = 4
_MAX_WINDOW_BYTES = 2**26  # total size of the files in a window; decoded they are several times as large
_READ_THREADS = 8  # number of threads that decode files


class BatchResult(NamedTuple):
    """done, answered, failed: number of requests so far, over all starts of the job; a request whose files cannot all be saved counts as
    both answered and failed. stopped: a signal arrived before the last request. burned_in: number of images and volumes of this start that
    may contain burned-in text. choices: number of images of this start by the CHOICES made for their display."""

    done: int
    answered: int
    failed: int
    stopped: bool
    burned_in: int
    choices: Mapping[str, int] = {}


class OpenedImage(NamedTuple):
    """An image or volume, and the prompts of each request on it, in order; a str instead of either is the reason why it cannot be read."""

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
    mask_threshold: float | None = None,
    max_new_tokens: int | None = None,
    save: Sequence[str] = (),
    volumes: bool = False,
    resume: bool = False,
) -> BatchResult:
    """Answer all requests of `source`, a folder of images or a .jsonl or .csv file of requests, into the folder `out`.

    load: returns the model; called after all checks that do not need it. question, frame, slice, series, window, mask_threshold,
    max_new_tokens: defaults for requests without their own. save: endings of SAVED, of the files to write for each answer. volumes: see
    `BatchRequests`. resume: continue the same job in `out`; without it, `out` must be new or empty.

    An invalid request, or a file that cannot be saved for its image (such as a .dcm for a PNG), is listed in failed.jsonl and does not
    affect the others. After SIGTERM or SIGINT the current window is finished first. Raises UserError, before anything is written, if the
    job as a whole is impossible."""
    check_window(window)
    for ending in save:
        if ending not in SAVED:
            raise UserError(f"{ending}: cannot be saved for each answer; use some of {', '.join(SAVED)}")
        if SAVED[ending]:
            import_medical(SAVED[ending])
    if question is not None:
        check_question(question)
    defaults = {
        "question": question, "frame": frame, "slice": slice, "series": series, "window": window, "mask_threshold": mask_threshold,
        "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    requests = BatchRequests(source, out, defaults, volumes)
    survey = requests.survey()
    if survey.faulty == survey.count:
        raise UserError(f"{source}: " + (f"no request is valid; the first: {survey.first}" if survey.count else "contains no request"))
    job = BatchJob(Path(out), {**defaults, "requests": survey.digest, "count": survey.count, "save": list(save)}, resume)
    burned_in, choices, stopped = 0, Counter[str](), False
    if job.done < survey.count:
        mimo = load()
        with job.claim(mimo.origin), StopSignal() as stop, ThreadPoolExecutor(_READ_THREADS) as pool, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="|".join([".*burned-in text", *CHOICES]))  # these images are counted instead
            windows = _windows(requests, job.done, _BATCHES_PER_WINDOW * mimo.config.generate.batch_size)
            with tqdm(total=survey.count, initial=job.done, desc="batch", unit="request", disable=None, smoothing=0.05) as bar:
                for items, opened in _read_ahead(pool, windows):
                    burned_in += _count_burned_in(opened)
                    choices.update(_choices(opened))
                    answers, faults = _answer(mimo, items, opened)
                    job.append(*_write_outputs(pool, items, answers, faults, job.out, save), len(items))
                    bar.update(len(items))
                    if stop.received:
                        break
            stopped = job.done < survey.count
    if stopped:
        job.join_windows()
    else:
        job.end()
    return BatchResult(job.done, job.answered, job.failed, stopped, burned_in, dict(choices))


def _windows(requests: BatchRequests, done: int, size: int) -> Iterator[list[BatchRequest]]:
    """Split the requests after the first `done` into windows of at most `size`, fewer if their files are large; deterministic."""
    window: list[BatchRequest] = []
    files: dict[Path, int] = {}
    for request in itertools.islice(requests, done, None):
        full = len(window) == size or sum(files.values()) > _MAX_WINDOW_BYTES
        if window and (request.is_volume or window[-1].is_volume or full):
            yield window
            window, files = [], {}
        window.append(request)
        files[request.path] = os.path.getsize(request.path) if os.path.isfile(request.path) else 0
    if window:
        yield window


def _read_ahead(
    pool: ThreadPoolExecutor, windows: Iterator[list[BatchRequest]]
) -> Iterator[tuple[list[BatchRequest], list[tuple[OpenedImage, int] | None]]]:
    """Yield each window with, for each of its requests, the opened image and the index of the request there (None for a faulty request),
    while the files of the next window are being read."""
    ahead = _submit(pool, next(windows, []))
    try:
        while ahead[0]:
            (items, futures, places), ahead = ahead, _submit(pool, next(windows, []))
            yield items, [None if place is None else (futures[place[0]].result(), place[1]) for place in places]
    finally:
        for future in ahead[1].values():
            future.cancel()


def _submit(pool: ThreadPoolExecutor, items: list[BatchRequest]) -> tuple[list[BatchRequest], dict[tuple, Future], list[tuple | None]]:
    """Start reading a window; returns (the window, image key -> future, and for each request its image key and index there)."""
    groups: dict[tuple, list[BatchRequest]] = defaultdict(list)
    places: list[tuple | None] = []
    for item in items:
        key = (item.path, item.frame, item.slice, item.series, item.window)
        places.append(None if item.fault else (key, len(groups[key])))
        if not item.fault:
            groups[key].append(item)
    return items, {key: pool.submit(_open, of) for key, of in groups.items() if of}, places


def _open(items: Sequence[BatchRequest]) -> OpenedImage:
    """Read the image or volume that these requests share."""
    one = items[0]
    try:
        picture = open_scan(one.path, frame=one.frame, slice=one.slice, series=one.series, window=one.window)
    except UserError as error:
        return OpenedImage(_one_line(error), [""] * len(items))
    except OSError as error:
        return OpenedImage(f"{one.path}: {error.strerror}", [""] * len(items))
    if isinstance(picture, Volume):
        single = [not item.prompts and len(item.questions) == 1 for item in items]
        return OpenedImage(picture, [Prompts() if fits else f"{one.path}: a volume takes one question without prompts" for fits in single])
    height, width = picture.pixels.shape[:2]
    prompts: list[Prompts | str] = []
    for item in items:
        try:
            prompts.append(join_prompts(read_prompts(source, height, width, name, item.mask_threshold) for name, source in item.prompts))
        except UserError as error:
            prompts.append(_one_line(error))
    return OpenedImage(picture, prompts)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _choices(opened: Sequence[tuple[OpenedImage, int] | None]) -> Iterator[str]:
    """The CHOICES made for each picture."""
    shown = {id(found[0].picture): found[0].picture for found in opened if found and isinstance(found[0].picture, MedicalImage)}
    return (choice.partition(":")[0] for picture in shown.values() for choice in picture.warnings if choice.startswith(CHOICES))


def _count_burned_in(opened: Sequence[tuple[OpenedImage, int] | None]) -> int:
    """The number of DICOM images and volumes that are not declared free of burned-in text."""
    shown = {id(found[0].picture): found[0].picture for found in opened if found and not isinstance(found[0].picture, str)}
    grids = [p.grids if isinstance(p, Volume) else [p.grid] for p in shown.values()]
    return sum(any(isinstance(g, DicomGrid) and g.dataset.get("BurnedInAnnotation") != "NO" for g in of) for of in grids)


def _answer(
    mimo: Mimo, items: Sequence[BatchRequest], opened: Sequence[tuple[OpenedImage, int] | None]
) -> tuple[list[list[Answer | VolumeAnswer]], dict[int, str]]:
    """Returns (the answers to each request's questions, {index of a failed request in the window: reason}). All first questions run
    together, then all second ones with the earlier turns as history, and so on; volumes run one after the other."""
    faults: dict[int, str] = {}
    answers: list[list[Answer | VolumeAnswer]] = [[] for _ in items]
    images: dict[int, MedicalImage | EncodedImage] = {}
    prompts: dict[int, Prompts] = {}
    for i, (item, found) in enumerate(zip(items, opened, strict=True)):
        if found is None:
            faults[i] = item.fault
        elif isinstance(picture := found[0].picture, str):
            faults[i] = picture
        elif isinstance(own_prompts := found[0].prompts[found[1]], str):
            faults[i] = own_prompts
        elif isinstance(picture, Volume):
            try:
                answers[i].append(ask_volume(mimo, picture, item.questions[0], max_new_tokens=item.max_new_tokens))
            except UserError as error:
                faults[i] = _one_line(error)
        else:
            images[i], prompts[i] = picture, own_prompts

    past: dict[int, list[TurnHistory]] = {i: [] for i in images}
    for turn in range(max((len(item.questions) for item in items), default=0)):
        requests: dict[int, Request] = {}
        for i, image in images.items():
            if turn >= len(items[i].questions) or i in faults:
                continue
            turn_prompts = prompts[i] if turn == 0 else Prompts()
            request = Request(image, items[i].questions[turn], turn_prompts, items[i].max_new_tokens, tuple(past[i]))
            try:
                mimo.check(request)
            except UserError as error:
                faults[i] = f"turn {turn + 1}: " * bool(turn) + _one_line(error)
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
        for i, (answer, after) in zip(requests, mimo.generate(list(requests.values())), strict=True):
            answers[i].append(answer)
            past[i].append(after)
    return answers, faults


def _write_outputs(
    pool: ThreadPoolExecutor,
    items: Sequence[BatchRequest],
    answers: Sequence[Sequence[Answer | VolumeAnswer]],
    faults: dict[int, str],
    out: Path,
    save: Sequence[str],
) -> tuple[list[dict], list[dict]]:
    """Save the files of each answer; returns (lines of answers.jsonl, lines of failed.jsonl) for the window."""
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
        lines.append({"id": item.id, "image": item.image, **({"turns": turns} if item.multi_turn else turns[0])})
    return lines, failures


def _save(answer: Answer | VolumeAnswer, paths: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Returns (names of the files written, reasons why others were not). A DICOM SEG without segments is invalid, so it is skipped."""
    names, refused = [], []
    segmented = answer.segmented_slices() if isinstance(answer, VolumeAnswer) else [e for e in answer.entities if e.area_px]
    for path in paths:
        if path.suffix == ".dcm" and not segmented:
            continue
        with disk_errors(path):
            try:
                answer.save(path)
                names.append(path.name)
            except UserError as error:
                refused.append(_one_line(error))
    return names, refused
