"""Free-running evaluation: the model answers from image, question and prompts alone, and what it says and paints is scored.

Axis letters: H, W height and width of the original image.

Prompts are drawn from the true masks with a key of their own for each sample, so that every evaluation of a sample shows the
model the same points, boxes and scribbles.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mimo_jax import files
from mimo_jax.config import MODALITIES, PERSPECTIVES, PROMPTED, Config
from mimo_jax.data.loading.collate import record_image, sample_prompts
from mimo_jax.data.loading.sources import Manifest, not_evaluable, open_source, open_sources
from mimo_jax.data.prompts import Prompts
from mimo_jax.data.records import DataError
from mimo_jax.data.schema import Record, Sample
from mimo_jax.data.tokenizer import Tokenizer
from mimo_jax.errors import UserError
from mimo_jax.eval import metrics
from mimo_jax.eval.accumulator import (
    AbstentionResult,
    Accumulator,
    ClosedEndedResult,
    EntityResult,
    GroundTruth,
    NameCounts,
    NamingResult,
    ground_truths,
)
from mimo_jax.eval.baselines import fit_baselines
from mimo_jax.eval.report import make_report, table, write_comparison
from mimo_jax.eval.standard_metrics import GROUNDED
from mimo_jax.infer.answers.answer import Answer
from mimo_jax.infer.answers.calibration import UNCALIBRATED, Calibration
from mimo_jax.infer.predictor import EncodedImage, Mimo, Request, TurnHistory

ABLATIONS = ("prompt", "image")  # take the prompts away; blacken the image
_BATCHES_AHEAD = 8  # batches of questions that are asked together, so that equal ones share a batch


@dataclass
class _Asked:
    """A sample on its way through its turns. ablate: None, "prompt" or "image"."""

    record: Record
    sample: Sample
    pixels: np.ndarray  # uint8 [H, W, 3], as it is
    image: EncodedImage  # as the model sees it
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
    overlay_count: int = 24,
) -> dict:
    """Report on the samples of `records`, a source or a list (`conventions` in it says how each figure is counted).

    limit: at most so many samples, the same ones every time, spread over `perspectives` and images. ablate: "prompt" or "image"
    asks everything without it; without `ablate`, II is asked again without prompts and closed VQA over a black image, for
    those figures alone. baselines: name → fitted predictor. overlays: a folder for up to `overlay_count` pictures, prediction
    beside truth, spread over perspectives and modalities. Raises ValueError for another `ablate`.
    """
    if ablate is not None and ablate not in ABLATIONS:
        raise ValueError(f"ablate: {ablate!r}; use one of {', '.join(ABLATIONS)}")
    runs = [ablate] if ablate else [None, *ABLATIONS]
    chosen = choose(records, limit, perspectives)
    return make_report(answered(mimo, records, chosen, runs, baselines, _Pictures(overlays, overlay_count)))


def answered(
    mimo: Mimo,
    records: Sequence[Record],
    chosen: dict[int, list[int]],
    runs: Sequence[str | None] = (None,),
    baselines: dict | None = None,
    pictures: _Pictures | None = None,
) -> Accumulator:
    """The chosen samples (see `choose`) asked and scored. runs: the first is that of all samples, the others of the figures that need
    them; baselines: as in `evaluate`."""
    results = Accumulator(mimo.calibration)
    blanks: dict[tuple[int, ...], EncodedImage] = {}  # black images by shape
    with tqdm(total=sum(map(len, chosen.values())), desc="evaluate", unit="sample", disable=None) as bar:
        for window in _windows(chosen, _BATCHES_AHEAD * mimo.config.generate.batch_size):
            asked = _ask_all(mimo, _prepare(mimo, records, window, runs, blanks, results), results)
            painted: dict[tuple[str, str], dict[str, np.ndarray]] = {}
            for item in asked:
                _score(item, runs[0], baselines or {}, painted, results, pictures or _Pictures(None, 0))
            bar.update(sum(map(len, window.values())))
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
) -> dict:
    """`mimo eval`: write report.json to `out`, whole or not at all, print a table, and put overlays into the folder `overlays`.

    Trivial baselines are fitted on the training split of the same data. Raises UserError or DataError for what cannot be read."""
    out = Path(out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"{out}: cannot be written; give the path of a file in a folder that is there")
    mimo = Mimo.load(checkpoint, base, allow_untrained, quantization)
    print(mimo.origin)
    records = open_source(data, split)
    train = open_source(data, "train")
    perspectives = perspectives_of(mimo.config)
    if len(perspectives) < len(PERSPECTIVES):
        print(f"this model's aligner ({mimo.config.model.aligner.kind}) reads no prompts: {', '.join(PROMPTED)} are left out")
    report = evaluate(mimo, records, limit, None, perspectives, fit_baselines(train), overlays)
    report["not_evaluable"] = records.not_evaluable if isinstance(records, Manifest) else not_evaluable(Joined([train, records]))
    report |= {"checkpoint": str(checkpoint), "origin": mimo.origin, "data": str(data), "split": split, "limit": limit}
    write_report(report, out)
    print(table(report))
    print(f"\nreport: {out}" + (f"\noverlays: {overlays}" if overlays else ""))
    return report


def evaluate_params(
    config: Config,
    params: dict,
    tokenizer: Tokenizer,
    split: str = "val",
    limit: int | None = None,
    overlays: str | os.PathLike | None = None,
    overlay_count: int = 24,
    calibration: Calibration = UNCALIBRATED,
) -> dict | None:
    """Report on the run's own sources and perspectives during training, without baselines; None where a source has no such
    split."""
    try:
        sources = open_sources(config, split)
    except DataError:
        return None
    perspectives = [p for p, weight in config.data.weights.items() if weight]
    mimo = Mimo(config, params, tokenizer, calibration=calibration)
    return evaluate(mimo, Joined(sources.values()), limit, None, perspectives, overlays=overlays, overlay_count=overlay_count)


def perspectives_of(config: Config) -> list[str]:
    """What a model can be asked."""
    return [p for p in PERSPECTIVES if p not in PROMPTED or not config.model.aligner.image_only()]


class Joined:
    """Several sources behind each other as one."""

    def __init__(self, sources: Iterable):
        self.places = [(source, i) for source in sources for i in range(len(source))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Record:
        source, i = self.places[number]
        return source[i]

    def samples(self, number: int) -> list[Sample]:
        source, i = self.places[number]
        return source.samples(i)


def write_report(report: dict, out: Path) -> None:
    """JSON to `out`; a reader sees the old file or the new one, never half of it."""
    with files.atomic_write(out) as part:
        part.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def choose(records: Sequence[Record], limit: int | None, perspectives: Sequence[str] = PERSPECTIVES) -> dict[int, list[int]]:
    """Record → its samples to ask. With a limit: one of each perspective from every image in a fixed random order, then a
    second of each, and so on, so that few samples still are of many images and all perspectives."""
    rng = np.random.default_rng(0)
    ranked = []
    for position, number in enumerate(rng.permutation(len(records)).tolist()):
        seen: dict[str, int] = defaultdict(int)
        samples = records[number].samples if isinstance(records, list) else records.samples(number)
        for index in rng.permutation(len(samples)).tolist():
            perspective = samples[index].perspective
            if perspective in perspectives:
                ranked.append((seen[perspective], position, PERSPECTIVES.index(perspective), number, index))
                seen[perspective] += 1
    chosen: dict[int, list[int]] = defaultdict(list)
    for *_, number, index in sorted(ranked)[:limit]:
        chosen[number].append(index)
    return {number: sorted(chosen[number]) for number in sorted(chosen)}


def _windows(chosen: dict[int, list[int]], samples: int) -> Iterator[dict[int, list[int]]]:
    """`chosen` in consecutive parts of about `samples` samples, whole images."""
    part: dict[int, list[int]] = {}
    for number, indices in chosen.items():
        part[number] = indices
        if sum(map(len, part.values())) >= samples:
            yield part
            part = {}
    if part:
        yield part


def _prepare(
    mimo: Mimo, records: Sequence[Record], window: dict[int, list[int]], runs: Sequence[str | None], blanks: dict, results: Accumulator
) -> list[_Asked]:
    """Samples of a window with their encoded images, likes beside likes; what cannot be read is tallied as unusable."""
    readable: list[tuple[Record, np.ndarray, list[Sample]]] = []
    for number, indices in window.items():
        record = records[number]
        try:
            readable.append((record, record_image(record), [record.samples[i] for i in indices]))
        except UserError as error:
            results.unusable += [{"sample": record.samples[i].sample_id, "reason": str(error)} for i in indices]
    sizes = {pixels.shape for _, pixels, _ in readable} - blanks.keys()
    encoded = mimo.encode([*(pixels for _, pixels, _ in readable), *(np.zeros(size, np.uint8) for size in sizes)]) if readable else []
    blanks |= dict(zip(sizes, encoded[len(readable) :], strict=True))
    asked = []
    for (record, pixels, samples), image in zip(readable, encoded, strict=False):
        for sample in samples:
            needed = {"prompt": sample.perspective == "II", "image": _is_closed(sample)}
            for run in (runs[0], *(run for run in runs[1:] if needed[run])):
                asked.append(_Asked(record, sample, pixels, blanks[pixels.shape] if run == "image" else image, run))
    return sorted(asked, key=lambda item: PERSPECTIVES.index(item.sample.perspective))


def _ask_all(mimo: Mimo, asked: list[_Asked], results: Accumulator) -> list[_Asked]:
    """Run every sample through its user turns, each after the model's own earlier answers; the unusable are left out."""
    done, bad = [], set()
    turn = 0
    going = asked
    while going:
        requests, ready = [], []
        for item in going:
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
        for item, (answer, past) in zip(ready, mimo.converse(requests) if requests else [], strict=True):
            item.answers.append(answer)
            item.past.append(past)
        turn += 1
        done += [item for item in ready if turn >= len(item.sample.turns) // 2]
        going = [item for item in ready if turn < len(item.sample.turns) // 2]
    return [item for item in done if item.sample.sample_id not in bad]


def _request(mimo: Mimo, item: _Asked, turn: int) -> Request:
    """The question of user turn `turn`, with prompts drawn on what it points at, the same ones at every evaluation."""
    user = item.sample.turns[2 * turn]
    prompts = Prompts()
    if user.prompted and item.ablate != "prompt":
        rng = np.random.default_rng([zlib.crc32(item.sample.sample_id.encode()), turn])
        masks = [item.record.mask(mask_id).decode() for mask_id in user.prompted]
        prompts = sample_prompts(masks, rng, mimo.config.model.prompt, f"sample {item.sample.sample_id}")
    return Request(item.image, user.text, prompts, past=tuple(item.past))


def _is_closed(sample: Sample) -> bool:
    return sample.perspective == "vqa" and sample.answer_type == "closed"


def _score(item: _Asked, ablate: str | None, baselines: dict, painted: dict, results: Accumulator, pictures: _Pictures) -> None:
    """Enter one answered sample into the results; the extra runs of an ablation enter their own figure alone."""
    record, sample = item.record, item.sample
    extra = item.ablate != ablate
    if sample.perspective == "vqa":
        if _is_closed(sample):
            correct = metrics.closed_correct(item.answers[-1].text, sample.references, sample.choices)
            row = ClosedEndedResult(record.group, sample.kind, metrics.closed_answer(sample.references[0]), correct)
            (results.closed_ended_image_blanked if extra else results.closed_ended).append(row)
        if not extra:
            results.samples["vqa"] += 1
        return

    marked = there = False
    painted_px = 0
    for number, answer in enumerate(item.answers):
        turn = 2 * number + 1
        truths = ground_truths(record, sample, turn)
        same = {t.written: t.name for t in truths}
        names = [same.get(e.entity, e.entity) for e in answer.entities]
        if sample.perspective == "II" and truths:
            row = NamingResult(record.group, truths[0].name, bool(names) and names[0] == truths[0].name)
            (results.naming_no_prompt if extra else results.naming).append(row)
        if extra:
            continue
        pairs = metrics.match(
            [t.name for t in truths], [t.mask for t in truths], names, [e.mask for e in answer.entities], by_name=sample.perspective != "II"
        )
        met = dict(pairs)
        results.painted += [(entity.evidence, met.get(k, 0.0)) for k, entity in enumerate(answer.entities)]
        for truth, (k, value) in zip(truths, pairs, strict=True):
            guess = np.zeros_like(truth.mask) if k is None else answer.entities[k].mask
            trivial = {kind: metrics.iou(_guess(b, kind, truth.name, item, painted), truth.mask) for kind, b in baselines.items()}
            overlap = metrics.overlap(truth.mask, guess)
            results.entities.append(EntityResult(sample.perspective, record.modality, truth.name, record.group, value, *overlap, trivial))
        results.names.append(NameCounts(sample.perspective, record.group, *metrics.name_counts([t.name for t in truths], names)))
        there, marked = there or bool(truths), marked or bool(names)
        painted_px += int(np.logical_or.reduce([e.mask for e in answer.entities]).sum()) if answer.entities else 0
        pictures.offer(item, number, truths)
    if not extra:
        results.samples[sample.perspective] += 1
        if sample.targets:
            results.abstentions.append(AbstentionResult(record.group, not there, not marked, painted_px))


def _guess(baseline, kind: str, entity: str, item: _Asked, painted: dict) -> np.ndarray:
    """A baseline's mask for an entity in an item's image, made once."""
    kept = painted.setdefault((item.record.id, kind), {})
    if entity not in kept:
        kept[entity] = baseline.predict(entity, item.record.height, item.record.width, item.pixels)
    return kept[entity]


class _Pictures:
    """Overlays of answers beside the truth, `count` in all: as many of each perspective, spread over its modalities."""

    def __init__(self, folder: str | os.PathLike | None, count: int):
        self.folder, self.left = folder, count if folder else 0
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
        self.most = -(-count // len(GROUNDED))  # of one perspective
        self.drawn: Counter = Counter()  # by perspective, and by (perspective, modality)

    def offer(self, item: _Asked, number: int, truths: Sequence[GroundTruth]) -> None:
        """The number-th answer of a sample, from 0."""
        kind = (item.sample.perspective, item.record.modality)
        if not self.left or self.drawn[kind[0]] >= self.most or self.drawn[kind] >= max(1, self.most // len(MODALITIES)):
            return
        self.drawn.update([kind[0], kind])
        self.left -= 1
        turn = f"_{number + 1}" if number else ""
        name = re.sub(r"[^\w.-]+", "_", f"{kind[0]}_{kind[1]}_{item.sample.sample_id}{turn}")
        told, marked = item.sample.turns[2 * number + 1].text, [(t.written, t.mask) for t in truths]
        write_comparison(Path(self.folder) / f"{name}.png", item.answers[number], told, marked)
