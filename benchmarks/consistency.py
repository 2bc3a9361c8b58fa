"""Consistency of answers: in a batch against alone, and with a cache against without.

    python benchmarks/consistency.py runs/a data/phantom

Asks a trained checkpoint questions of the test split: 16 mixed questions at a time against each alone, and conversations of three turns
with a cache against the same three turns without. Masks are compared if both ways have one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mimo_jax.data.conversation import encode_user_turn  # noqa: E402
from mimo_jax.data.loading.collate import record_image, sample_prompts  # noqa: E402
from mimo_jax.data.loading.sources import open_source  # noqa: E402
from mimo_jax.data.prompts import Prompts  # noqa: E402
from mimo_jax.eval.metrics import iou  # noqa: E402
from mimo_jax.infer.answers.answer import Answer  # noqa: E402
from mimo_jax.infer.engine.requests import Request  # noqa: E402
from mimo_jax.infer.predictor import Mimo  # noqa: E402

BATCHES, CHATS, TURNS = 12, 24, 3


def requests_of(mimo: Mimo, data: str, count: int) -> list[list[Request]]:
    """For each image, its questions with their prompts."""
    source, made = open_source(data, "test"), []
    for number in range(count):
        record = source[number]
        image, rng = record_image(record), np.random.default_rng(number)
        asked = []
        for sample in record.samples:
            turn = sample.turns[0]
            masks = [record.mask(name).decode() for name in turn.prompted]
            prompts = sample_prompts(masks, rng, mimo.config.model.prompt, sample.sample_id) if masks else Prompts()
            asked.append(Request(image, turn.text, prompts))
        made.append(asked)
    return made


class Agreement:
    def __init__(self):
        self.pairs, self.same_text, self.ious = 0, 0, []

    def add(self, a: Answer, b: Answer) -> None:
        self.pairs += 1
        self.same_text += a.text == b.text
        self.ious += [iou(x.mask, y.mask) for x, y in zip(a.entities, b.entities, strict=False)]

    def __str__(self) -> str:
        return f"{self.same_text} of {self.pairs} texts equal, {len(self.ious)} masks, minimum IoU {min(self.ious):.5f}"


def main() -> None:
    checkpoint, data = sys.argv[1:]
    mimo = Mimo.load(checkpoint)
    mimo.config.generate.batch_size = 16
    images = requests_of(mimo, data, max(BATCHES * 16 // 4, CHATS))
    rng = np.random.default_rng(0)

    mixed = [request for asked in images for request in asked]
    mixed = [mixed[i] for i in rng.permutation(len(mixed))[: 16 * BATCHES]]
    tally = Agreement()
    for at in range(0, len(mixed), 16):
        for request, batched in zip(mixed[at : at + 16], mimo.predict(mixed[at : at + 16]), strict=True):
            tally.add(batched, mimo.predict([request])[0])
    print(f"16 mixed requests in a batch against each alone: {tally}", flush=True)

    tally, extra, encoded = Agreement(), 0, 0
    for asked in images[:CHATS]:
        chat, past = mimo.open(asked[0].image), []
        images_before = mimo.engine.counts["images"]
        for number in range(TURNS):
            request = asked[rng.integers(len(asked))]
            before = mimo.engine.counts["prefilled"]
            answer = chat.ask(request.question, prompts=request.prompts)
            own = len(encode_user_turn(mimo.tokenizer, mimo.config, request.question, number, number == 0)[0])
            extra += mimo.engine.counts["prefilled"] - before - own
            ((uncached, turn),) = mimo.generate([Request(chat.image, request.question, request.prompts, past=past)])
            past.append(turn)
            tally.add(answer, uncached)
        encoded += mimo.engine.counts["images"] - images_before
    print(f"{CHATS} chats of {TURNS} turns with a cache against without: {tally}")
    print(f"tokens prefilled beyond each turn's own: {extra}; images encoded after opening: {encoded}")


if __name__ == "__main__":
    main()
