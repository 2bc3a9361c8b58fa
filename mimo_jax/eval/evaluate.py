"""Free-running evaluation: the model answers from image, question and prompts alone, and its texts and masks are scored.

Axis letters: H, W height and width of the original image.

Prompts are sampled from the true masks with a random key per sample, so that every evaluation of a sample gives the model the
same points, boxes and scribbles.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from mimo_jax import distributed, files
from mimo_jax.config import MODALITIES, PERSPECTIVES, PROMPTED, Config
from mimo_jax.data.loading.collate import record_image, sample_prompts
from mimo_jax.data.loading.sources import Manifest, has_split, not_evaluable, open_source, open_sources
from mimo_jax.data.prompts import Prompts
from mimo_jax.data.records import DataError
from mimo_jax.data.schema import Record, Sample
from mimo_jax.data.tokenizer import Tokenizer
from mimo_jax.errors import UserError
from mimo_jax.eval import scoring
from mimo_jax.eval.accumulator import Accumulator, GroundTruth, SampleResult, ground_truths
from mimo_jax.eval.baselines import fit_baselines
from mimo_jax.eval.compare import samples_path, write_samples
from mimo_jax.eval.registry import values_by_sample
from mimo_jax.eval.report import make_report, table, write_comparison
from mimo_jax.eval.selection import ConcatSource, select_samples, windows_of
from mimo_jax.eval.standard_metrics import GROUNDED
from mimo_jax.infer.answers.answer import Answer
from mimo_jax.infer.answers.calibration import UNCALIBRATED, Calibration
from mimo_jax.infer.predictor import EncodedImage, Mimo, Request, TurnHistory

ABLATIONS = ("prompt", "image")  # remove the prompts; replace the image by a black one
_OVERLAYS = 24  # maximum number of overlays


class EvaluationStopped(Exception):
    """`stop` returned True in a process; there are no results."""


@dataclass
class _EvalItem:
    """A sample, with the answers to the turns asked so far. ablate: None, "prompt" or "image"."""

    record: Record
    sample: Sample
    pixels: np.ndarray  # uint8 [H, W, 3], the original image
    image: EncodedImage  # the image that the model gets, which may be a black one
    ablate: str | None
    answers: list[Answer] = field(default_factory=list)
    past: list[TurnHistory] = field(default_factory=list)


def evaluate(
    mimo: Mimo,
    records: Sequence[Record],
    limit: int | None = None,
    ablate: str | None = None,
    perspectives: Sequence[str] = PERSPECTIVES,
    baselines: dict | None = None,
    overlays: str | os.PathLike | None = None,
    overlay_count: int = _OVERLAYS,
    stop: Callable[[], bool] = lambda: False,
    in_sample: bool = False,
) -> dict:
    """Evaluate the samples of `records`, a source or a list; returns the report, whose `conventions` say how each metric is counted.

    limit: maximum number of samples, the same ones every time, spread over `perspectives` and images. ablate: "prompt" or "image"
    asks all questions without it. If it is None, II is asked again without prompts and closed-ended VQA with a black image, for the
    metrics that need these answers. baselines: name → fitted predictor. overlays: a folder for up to `overlay_count` images of
    prediction next to ground truth, spread over perspectives and modalities. stop, and several processes: see `collect_results`.
    in_sample: whether the calibration of `mimo` was fitted on patients or cases of these records; the report says so. Raises ValueError
    for another `ablate`.
    """
    if ablate is not None and ablate not in ABLATIONS:
        raise ValueError(f"ablate: {ablate!r}; use one of {', '.join(ABLATIONS)}")
    runs = [ablate] if ablate else [None, *ABLATIONS]
    chosen = select_samples(records, limit, perspectives)
    report = make_report(collect_results(mimo, records, chosen, runs, baselines, _OverlayWriter(overlays, overlay_count), stop))
    report["score"]["in_sample"] = in_sample
    return report


def collect_results(
    mimo: Mimo,
    records: Sequence[Record],
    chosen: dict[int, list[int]],
    runs: Sequence[str | None] = (None,),
    baselines: dict | None = None,
    overlays: _OverlayWriter | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Accumulator:
    """Ask and score the chosen samples (see `select_samples`). runs: ablations; the first applies to all samples, the others are extra
    runs of those samples whose metrics need them; baselines: as in `evaluate`.

    If there are several processes (`distributed.run`), all must call this, with the model on their own devices: each answers every n-th
    window, and all return the results of all windows, which do not depend on the number of processes. stop: polled between the windows,
    of one batch if the samples are few; if it returns True in any process, all raise EvaluationStopped."""
    writer = overlays or _OverlayWriter(None, 0)
    windows = windows_of(chosen, mimo.config.generate.batch_size)
    parts: dict[int, Accumulator] = {}  # by number of the window
    blanks: dict[tuple[int, ...], EncodedImage] = {}  # black images by shape
    stopped = False
    with tqdm(total=sum(map(len, chosen.values())), desc="evaluate", unit="sample", disable=None) as bar:
        for number in range(jax.process_index(), len(windows), jax.process_count()):
            if stopped := stop():
                break
            part = parts[number] = Accumulator(mimo.calibration)
            asked = _ask_all(mimo, _encode_window(mimo, records, windows[number], runs, blanks, part), part)
            baseline_masks: dict[tuple[str, str], dict[str, np.ndarray]] = {}  # (record, baseline) -> entity -> mask
            for item in asked:
                _score(item, runs[0], baselines or {}, baseline_masks, part, writer)
            writer.end_window(number)
            bar.update(sum(map(len, windows[number].values())))
    gathered = distributed.gather_objects((stopped, parts, writer.written))
    if any(stopped for stopped, *_ in gathered):
        raise EvaluationStopped
    writer.keep_first(sorted(overlay for *_, written in gathered for overlay in written))
    results = Accumulator(mimo.calibration)
    for _, part in sorted(pair for _, parts, _ in gathered for pair in parts.items()):
        results.extend(part)
    return results


def evaluate_checkpoint(
    checkpoint: str | os.PathLike,
    data: str | os.PathLike,
    split: str,
    out: str | os.PathLike,
    limit: int | None = None,
    overlays: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    allow_untrained: bool = False,
    quantization: str = "",
    baselines_from: str | os.PathLike | None = None,
) -> dict:
    """`mimo eval`: write the report atomically to `out`, with the results by sample beside it (see `compare`), print a table, and write
    overlays to the folder `overlays`.

    Trivial baselines are fitted on the training split of the dataset `baselines_from`, or else of the same data; without one they are
    left out. Raises UserError or DataError if an input cannot be read."""
    out = Path(out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"{out}: cannot be written; give the path of a file in an existing folder")
    mimo = Mimo.load(checkpoint, base, allow_untrained, quantization)
    print(mimo.origin)
    records = open_source(data, split)
    train = open_source(baselines_from, "train") if baselines_from else open_source(data, "train") if has_split(data, "train") else None
    if train is None:
        print(f"{data}: has no split train; trivial baselines are left out, or give a dataset to fit them on with --baselines-from")
    perspectives = supported_perspectives(mimo.config)
    if len(perspectives) < len(PERSPECTIVES):
        print(f"this model's aligner ({mimo.config.model.aligner.kind}) takes no prompts: {', '.join(PROMPTED)} are skipped")
    baselines = None if train is None else fit_baselines(train)
    chosen = select_samples(records, limit, perspectives)
    results = collect_results(mimo, records, chosen, [None, *ABLATIONS], baselines, _OverlayWriter(overlays, _OVERLAYS))
    report = make_report(results)
    report["score"]["in_sample"] = mimo.calibration.fitted.get("split") == split
    if isinstance(records, Manifest):
        report["not_evaluable"] = records.not_evaluable
    elif train is not None:
        if train.entity_groups is None or records.entity_groups is None:
            print(f"{data}: was built by an earlier version; build it again to list structures of one patient alone")
        else:
            report["not_evaluable"] = not_evaluable(train.entity_groups, records.entity_groups)
    report |= {"checkpoint": str(checkpoint), "origin": mimo.origin, "data": str(data), "split": split, "limit": limit}
    write_samples(values_by_sample(results), out)
    write_report(report, out)
    print(table(report))
    print(f"\nreport: {out}\nby sample: {samples_path(out)}" + (f"\noverlays: {overlays}" if overlays else ""))
    return report


def evaluate_params(
    config: Config,
    params: dict,
    tokenizer: Tokenizer,
    split: str = "val",
    limit: int | None = None,
    overlays: str | os.PathLike | None = None,
    overlay_count: int = _OVERLAYS,
    calibration: Calibration = UNCALIBRATED,
    stop: Callable[[], bool] = lambda: False,
) -> dict | None:
    """Evaluate on the run's own sources and perspectives during training, without baselines; returns the report, or None if a source
    lacks the split. stop, and several processes: see `collect_results`."""
    try:
        sources = open_sources(config, split)
    except DataError:
        return None
    perspectives = [p for p, weight in config.data.weights.items() if weight]
    mimo = Mimo(config, params, tokenizer, calibration=calibration)
    records = ConcatSource(sources.values())
    in_sample = calibration.fitted.get("in_sample", False)
    return evaluate(mimo, records, limit, None, perspectives, None, overlays, overlay_count, stop, in_sample)


def supported_perspectives(config: Config) -> list[str]:
    """The perspectives that a model supports."""
    return [p for p in PERSPECTIVES if p not in PROMPTED or not config.model.aligner.image_only()]


def write_report(report: dict, out: Path) -> None:
    """Write JSON to `out` atomically: a reader sees the old file or the new one, never a partial one."""
    with files.atomic_write(out) as part:
        part.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _encode_window(
    mimo: Mimo, records: Sequence[Record], window: dict[int, list[int]], runs: Sequence[str | None], blanks: dict, results: Accumulator
) -> list[_EvalItem]:
    """The samples of a window with their encoded images, sorted by perspective; unreadable ones are recorded as unusable."""
    readable: list[tuple[Record, np.ndarray, list[Sample]]] = []
    for number, indices in window.items():
        record = records[number]
        try:
            readable.append((record, record_image(record), [record.samples[i] for i in indices]))
        except UserError as error:
            results.unusable += [{"sample": record.samples[i].sample_id, "reason": str(error)} for i in indices]
    sizes = {pixels.shape for _, pixels, _ in readable} - blanks.keys()
    encoded = mimo.encode([pixels for _, pixels, _ in readable]) if readable else []
    for size in sizes:  # alone, so that no batch depends on the windows before
        blanks |= {size: mimo.encode([np.zeros(size, np.uint8)])[0]}
    asked = []
    for (record, pixels, samples), image in zip(readable, encoded, strict=True):
        for sample in samples:
            needed = {"prompt": sample.perspective == "II", "image": _is_closed_ended(sample)}
            for run in (runs[0], *(run for run in runs[1:] if needed[run])):
                asked.append(_EvalItem(record, sample, pixels, blanks[pixels.shape] if run == "image" else image, run))
    return sorted(asked, key=lambda item: PERSPECTIVES.index(item.sample.perspective))


def _ask_all(mimo: Mimo, asked: list[_EvalItem], results: Accumulator) -> list[_EvalItem]:
    """Ask the user turns of every sample in order, each after the model's own earlier answers; returns the samples that are usable."""
    done, bad = [], set()
    turn = 0
    active = asked
    while active:
        requests, ready = [], []
        for item in active:
            try:
                request = _request(mimo, item, turn)
                mimo.check(request)
            except UserError as error:
                if item.sample.sample_id not in bad:
                    results.unusable.append({"sample": item.sample.sample_id, "reason": str(error)})
                bad.add(item.sample.sample_id)
                continue
            requests.append(request)
            ready.append(item)
        for item, (answer, past) in zip(ready, mimo.generate(requests) if requests else [], strict=True):
            item.answers.append(answer)
            item.past.append(past)
        turn += 1
        done += [item for item in ready if turn >= len(item.sample.turns) // 2]
        active = [item for item in ready if turn < len(item.sample.turns) // 2]
    return [item for item in done if item.sample.sample_id not in bad]


def _request(mimo: Mimo, item: _EvalItem, turn: int) -> Request:
    """The question of user turn `turn`, with prompts sampled on its targets, the same ones in every evaluation."""
    user = item.sample.turns[2 * turn]
    prompts = Prompts()
    if user.prompted and item.ablate != "prompt":
        rng = np.random.default_rng([zlib.crc32(item.sample.sample_id.encode()), turn])
        masks = [item.record.mask(mask_id).decode() for mask_id in user.prompted]
        prompts = sample_prompts(masks, rng, mimo.config.model.prompt, f"sample {item.sample.sample_id}")
    return Request(item.image, user.text, prompts, past=tuple(item.past))


def _is_closed_ended(sample: Sample) -> bool:
    return sample.perspective == "vqa" and sample.answer_type == "closed"


def _score(
    item: _EvalItem, ablate: str | None, baselines: dict, baseline_masks: dict, results: Accumulator, overlays: _OverlayWriter
) -> None:
    """Add one answered sample to the results; the extra runs of an ablation are added only to their own metric."""
    record, sample = item.record, item.sample
    extra = item.ablate != ablate
    if not extra:
        results.samples[sample.perspective] += 1
        results.scored.append(SampleResult(sample.sample_id, record.group, scoring.digest(record, sample)))
    if sample.perspective == "vqa":
        scoring.score_vqa(record, sample, item.answers, extra, results)
        return
    any_present = False
    for number, answer in enumerate(item.answers):
        turn = 2 * number + 1
        truths = ground_truths(record, sample, turn)
        any_present = any_present or bool(truths)
        naming = results.naming_no_prompt if extra else results.naming
        scoring.score_naming(record, sample, truths, scoring.entity_names(answer, truths), naming)
        if not extra:
            entities = {truth.name for truth in truths}
            trivial = {
                kind: {name: _baseline_mask(baseline, kind, name, item, baseline_masks) for name in entities}
                for kind, baseline in baselines.items()
            }
            scoring.score_masks(record, sample, turn, truths, answer, trivial, results)
            overlays.maybe_write(item, number, truths)
    if not extra:
        scoring.score_abstention(record, sample, item.answers, any_present, results)


def _baseline_mask(baseline, kind: str, entity: str, item: _EvalItem, masks: dict) -> np.ndarray:
    """A baseline's mask for an entity in an item's image, cached in `masks`."""
    cached = masks.setdefault((item.record.id, kind), {})
    if entity not in cached:
        cached[entity] = baseline.predict(entity, item.record.height, item.record.width, item.pixels)
    return cached[entity]


class _OverlayWriter:
    """Writes `count` overlays of answers next to the ground truth: equally many per perspective, spread over its modalities.

    written: (window, number in it, (perspective, modality), file name) of each overlay of this process."""

    def __init__(self, folder: str | os.PathLike | None, count: int):
        self.folder, self.count = folder, count if folder else 0
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
        self.per_perspective = -(-count // len(GROUNDED))
        self.written: list[tuple[int, int, tuple[str, str], str]] = []
        self._counts: Counter = Counter()  # overlays written: all, by perspective, and by (perspective, modality)
        self._window: list[tuple[tuple[str, str], str]] = []

    def end_window(self, number: int) -> None:
        self.written += [(number, place, *overlay) for place, overlay in enumerate(self._window)]
        self._window = []

    def keep_first(self, written: Sequence[tuple[int, int, tuple[str, str], str]]) -> None:
        """Keep those of the overlays of all processes that one process alone, which sees all windows, would have written."""
        self._counts.clear()
        surplus = [name for *_, kind, name in written if not self._count(kind)]
        for name in surplus if jax.process_index() == 0 else ():
            (Path(self.folder) / name).unlink()

    def _count(self, kind: tuple[str, str]) -> bool:
        """Count an overlay of this perspective and modality; False if no more of it are needed."""
        per_modality = max(1, self.per_perspective // len(MODALITIES))
        limits = {"all": self.count, kind[0]: self.per_perspective, kind: per_modality}
        needed = all(self._counts[name] < limit for name, limit in limits.items())
        if needed:
            self._counts.update(limits.keys())
        return needed

    def maybe_write(self, item: _EvalItem, number: int, truths: Sequence[GroundTruth]) -> None:
        """Write the overlay of answer `number` of a sample (from 0) if its perspective and modality still need one."""
        kind = (item.sample.perspective, item.record.modality)
        if not self._count(kind):
            return
        turn = f"_{number + 1}" if number else ""
        name = re.sub(r"[^\w.-]+", "_", f"{kind[0]}_{kind[1]}_{item.sample.sample_id}{turn}")
        true_text, true_masks = item.sample.turns[2 * number + 1].text, [(t.written, t.mask) for t in truths]
        self._window.append((kind, f"{name}.png"))
        write_comparison(Path(self.folder) / f"{name}.png", item.answers[number], true_text, true_masks)
