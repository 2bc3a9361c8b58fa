"""How far trivial predictors and guesses come on a data set: what the builder's questions are held against."""

from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np

from mimo_jax.data.loading.collate import record_image
from mimo_jax.data.schema import Record
from mimo_jax.eval.baselines import BestThreshold, MeanMask
from mimo_jax.eval.metrics import iou


def score_baselines(baselines: dict[str, MeanMask | BestThreshold], records: Iterable[Record]) -> dict[str, dict[str, dict[str, float]]]:
    """baseline → perspective → entity → mean IoU over that perspective's targets (told the entity's name); "mean" is over all targets."""
    found: dict = {name: defaultdict(lambda: defaultdict(list)) for name in baselines}
    for record in records:
        image, masks, guesses = record_image(record), {m.mask_id: m.decode() for m in record.masks}, {}
        for sample in record.samples:
            for target in sample.targets:
                if target.absent or sample.perspective == "vqa":
                    continue
                truth = np.any([masks[i] for i in target.mask_ids], axis=0)
                for name, baseline in baselines.items():
                    key = (name, target.entity)
                    if key not in guesses:
                        guesses[key] = baseline.predict(target.entity, record.height, record.width, image)
                    found[name][sample.perspective][target.entity].append(iou(guesses[key], truth))
    return {
        name: {
            perspective: {
                "mean": float(np.mean([x for values in entities.values() for x in values])),
                **{entity: float(np.mean(values)) for entity, values in sorted(entities.items())},
            }
            for perspective, entities in sorted(perspectives.items())
        }
        for name, perspectives in found.items()
    }


def score_guessing(train: Iterable[Record], test: Iterable[Record]) -> dict[str, float]:
    """Closed VQA accuracy on `test` without any image: of the most frequent answer, and of the most frequent one of each question's text
    (both learnt from `train`)."""
    overall: Counter[str] = Counter()
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in _closed(train):
        overall[answer] += 1
        by_text[question][answer] += 1
    pairs = list(_closed(test))
    if not overall or not pairs:
        return {"majority": 0.0, "text_only": 0.0}
    common = overall.most_common(1)[0][0]
    guesses = {question: answers.most_common(1)[0][0] for question, answers in by_text.items()}
    return {
        "majority": float(np.mean([answer == common for _, answer in pairs])),
        "text_only": float(np.mean([answer == guesses.get(question, common) for question, answer in pairs])),
    }


def _closed(records: Iterable[Record]):
    for record in records:
        for sample in record.samples:
            if sample.perspective == "vqa" and sample.answer_type == "closed":
                yield sample.turns[0].text, sample.references[0]
