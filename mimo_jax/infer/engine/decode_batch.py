"""One batch of requests on its way to answers: aligned, prefilled, decoded piece by piece, painted.

Axis letters: B rows of a batch, T prompt bucket, R turns, Q tokens of one turn's X_q, D width of the language model, S `<SEG>`
slots, m side of the mask decoder's output.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config import Config
from mimo_jax.data import conversation
from mimo_jax.data.prompts import sam_points
from mimo_jax.data.tokenizer import Tokenizer
from mimo_jax.data.transforms import mask_from_logits
from mimo_jax.infer.answers.answer import Answer, Entity
from mimo_jax.infer.answers.calibration import Calibration, ConfidenceFeatures
from mimo_jax.infer.engine.compiled import Engine
from mimo_jax.infer.engine.requests import EncodedImage, EncodedTurn, Request, TurnHistory
from mimo_jax.model_config import GROUNDING_TOKENS

_LENGTH_STEP = 32  # prompt buckets: 32, 64, 96, 128, then 192, 256, 384, 512, 768, …
# The end of a text that the next token may turn into something else: a cut character, a spelt-out tag (which is dropped), a space.
_BEGUN = "|".join(sorted({re.escape(tag[:n]) for tag in GROUNDING_TOKENS for n in range(1, len(tag))}, reverse=True))
_UNFINISHED = re.compile(rf"\s*({_BEGUN}|\ufffd*)\s*$")
_STOP_STEP = 8  # tokens between looks for a stop string


class DecodeBatch:
    """A batch of at most `rows` requests; rows that only fill it up generate nothing.

    `decode` until `done`, then `finish`; in between, `text` and `paint` tell what there is already."""

    def __init__(
        self,
        engine: Engine,
        config: Config,
        tokenizer: Tokenizer,
        calibration: Calibration,
        requests: Sequence[Request],
        images: Sequence[EncodedImage],
        turns: Sequence[EncodedTurn],
        rows: int,
    ):
        """images: encoded, their features on the device. A request's kept cache is used up until `finish` hands it back."""
        self.engine, self.config, self.tokenizer, self.calibration = engine, config, tokenizer, calibration
        self.requests, self.images, self.turns, self.rows = requests, images, turns, rows
        self.features = [image.features for image in images]  # held, whatever the store lets go
        self.entities: list[list[Entity]] = [[] for _ in turns]
        self.said: list[list[int]] = [[] for _ in turns]
        self.stopped: list[tuple[int, int] | None] = [None] * len(turns)  # (ids, characters) before a stop string
        self.done = False

        limits = np.zeros(rows, np.int32)
        limits[: len(turns)] = [turn.limit for turn in turns]
        usual, most = config.generate.max_new_tokens, int(limits.max())
        self.new_tokens = usual if most <= usual else bucket(most)
        self._prefill(limits)

    def _prefill(self, limits: np.ndarray) -> None:
        """All that is not in a kept cache: the new turn, or the whole conversation."""
        kept = self.requests[0].cache if self.rows == 1 else None
        cache, start = (kept.arrays, kept.length) if kept and kept.length else (None, 0)
        if kept:
            kept.release()  # the arrays are used up below; should anything fail, the next turn starts without
        slots = cache_bucket(min(max(len(turn.ids) for turn in self.turns) + self.new_tokens, self.config.model.llm.max_length))
        if cache is None:
            cache = self.engine.new_cache(self.rows, slots)
        elif cache["k"].shape[3] < slots:
            cache = self.engine.extend(cache, slots)

        x_img = _stacked_on_device([image.x_img for image in self.images], self.rows)
        names = ("instruction_ids", "instruction_mask", "prompt_xy", "prompt_kind")
        aligned = (stacked([getattr(turn, name) for turn in self.turns], self.rows)[:, None] for name in names)
        self.x_q = self.engine.align(x_img, *aligned)  # [B, 1, Q, D]
        skipped = len(self.requests[0].past) * self.config.model.query_tokens() if start else 0
        x_q = self.x_q if start else self._with_past()

        length = bucket(max(len(turn.ids) - start for turn in self.turns))
        ids, query_index = np.zeros((self.rows, length), np.int32), np.full((self.rows, length), -1, np.int32)
        lengths = np.ones(self.rows, np.int32)
        for b, turn in enumerate(self.turns):
            lengths[b] = len(turn.ids) - start
            ids[b, : lengths[b]] = turn.ids[start:]
            query_index[b, : lengths[b]] = [max(q - skipped, -1) for q in turn.query_index[start:]]
        sampling = [request.sampling for request in self.requests]
        self.state = self.engine.prefill(
            *(cache, x_q, ids, query_index, np.full(self.rows, start, np.int32), lengths, limits),
            stacked([np.float32(s.temperature) for s in sampling], self.rows),
            stacked([np.float32(s.top_p) for s in sampling], self.rows),
            stacked([np.uint32(s.seed) for s in sampling], self.rows),
            self.new_tokens,
        )

    def _with_past(self) -> jax.Array:
        """X_q of all turns [B, R, Q, D]: each row's earlier ones as they were, then the new one."""
        turns = _power_of_two(1 + max(len(request.past) for request in self.requests))
        if turns == 1:
            return self.x_q
        new = self.x_q[:, 0]
        nothing = jnp.zeros_like(new[0])
        made = []
        for b in range(self.rows):
            earlier = [turn.x_q for turn in self.requests[b].past] if b < len(self.requests) else []
            made.append(jnp.stack([*earlier, new[b], *[nothing] * (turns - 1 - len(earlier))]))
        return jnp.stack(made)

    def decode(self, tokens: int | None = None) -> None:
        """So many tokens further, or to the end."""
        step = min(tokens or self.new_tokens, _STOP_STEP if self._stops() else self.new_tokens)
        goal = self.new_tokens if tokens is None else min(self.new_tokens, int(self.state.step) + tokens)
        while not self.done and (at := int(self.state.step)) < goal:
            self.state = self.engine.decode(self.state, min(goal, at + step))
            self._sync()

    def _stops(self) -> bool:
        return any(request.sampling.stop for request in self.requests)

    def _sync(self) -> None:
        """Fetch what was said; end the rows in which a stop string came."""
        ids, taken, live, self.ended, self.probs = jax.device_get(
            (self.state.ids, self.state.num_generated, self.state.active, self.state.ended, self.state.probs)
        )
        self.said = [ids[b, : taken[b]].tolist() for b in range(len(self.turns))]
        if self._stops():
            self.stopped = [self._stop(b) for b in range(len(self.turns))]
            live = live & ~np.array([*map(bool, self.stopped), *[False] * (self.rows - len(self.turns))])
            self.state = self.state._replace(active=jnp.asarray(live))
        self.done = not live.any() or int(self.state.step) >= self.new_tokens

    def _stop(self, b: int) -> tuple[int, int] | None:
        """(ids whose text stands wholly before the first stop string, characters before it), None if none came."""
        text = self._parsed(self.said[b])[0]
        found = [at for stop in self.requests[b].sampling.stop if (at := text.find(stop)) >= 0]
        if not found:
            return None
        count = next(n for n in range(len(self.said[b]), -1, -1) if len(self._parsed(self.said[b][:n])[0]) <= min(found))
        return count, min(found)

    def _parsed(self, ids: Sequence[int]) -> tuple[str, list[dict], list[tuple[str, int, int]]]:
        return conversation.parse_ids(self.tokenizer, ids)

    def text(self, b: int) -> str:
        """What row b has said so far and will not take back: not what may yet become a stop string or another character."""
        text = self._text(b)[0]
        if self.done:
            return text
        held = max((len(stop) for stop in self.requests[b].sampling.stop), default=1) - 1
        return _UNFINISHED.sub("", text[: len(text) - held])

    def _text(self, b: int) -> tuple[str, list[dict], list[tuple[str, int, int]]]:
        """Row b's clean text, its pieces and phrases, up to a stop string."""
        if self.stopped[b] is None:
            return self._parsed(self.said[b])
        count, characters = self.stopped[b]
        text, pieces, phrases = self._parsed(self.said[b][:count])
        rest = self._parsed(self.said[b])[0][len(text) : characters]  # of the token in which the stop string begins
        return text + rest, pieces + [{"text": rest, "seg": None}] * bool(rest), phrases

    def decode_masks(self) -> list[list[Entity]]:
        """Every row's entities so far; one call of the decoder paints all new ones."""
        phrases = [self._text(b)[2] for b in range(len(self.turns))]
        counts = [len(self.said[b]) if self.stopped[b] is None else self.stopped[b][0] for b in range(len(self.turns))]
        places = [[n for n, i in enumerate(said[:count]) if i == self.tokenizer.seg] for said, count in zip(self.said, counts, strict=True)]
        new = [row[len(there) :] for row, there in zip(places, self.entities, strict=True)]
        if most := max(map(len, new)):
            index = np.zeros((self.rows, _power_of_two(most)), np.int32)
            for b, row in enumerate(new):
                index[b, : len(row)] = row
            features = _stacked_on_device(self.features, self.rows)
            generate = self.config.generate
            points = self._points() if generate.sam_prompts else None
            painted = self.engine.segment(features, self.state.states, index, sum(map(len, new)), points, generate.refine)
            logits, iou = jax.device_get(painted)
            for b, row in enumerate(new):
                image = self.images[b]
                for s, place in enumerate(row):
                    k = len(self.entities[b])
                    mask = mask_from_logits(logits[b, s], image.sam_frame, *image.pixels.shape[:2])
                    since = places[b][k - 1] + 1 if k else 0
                    evidence = ConfidenceFeatures.of(logits[b, s], image.sam_frame, iou[b, s], self.probs[b, since : place + 1])
                    spacing = image.picture.spacing_mm
                    self.entities[b].append(Entity.of(k, phrases[b][k][0], mask, evidence, self.calibration, spacing))
        return self.entities

    def _points(self) -> tuple[np.ndarray, np.ndarray]:
        """What every row's new turn marks, for SAM: xy [B, P + 1, 2], labels [B, P + 1]."""
        made = [
            sam_points(turn.prompt_xy, turn.prompt_kind, image.vision_frame, image.sam_frame)
            for turn, image in zip(self.turns, self.images, strict=True)
        ]
        xy, labels = zip(*made, strict=True)
        return stacked(xy, self.rows), stacked(labels, self.rows)

    def finish(self) -> list[tuple[Answer, TurnHistory]]:
        """The answers, and what each request's chat needs for its next turn; a kept cache holds what was said."""
        self.decode_masks()
        results = []
        for b, (request, image, turn) in enumerate(zip(self.requests, self.images, self.turns, strict=True)):
            text, pieces, _ = self._text(b)
            parts = [{"text": p["text"]} if p["seg"] is None else {"text": p["text"], "entity_id": p["seg"]} for p in pieces]
            truncated = not self.ended[b] and self.stopped[b] is None
            asked = (request.question, image.pixels, turn.prompts, image.picture.grid)
            answer = Answer(text, parts, self.entities[b], truncated, *asked, bool(self.calibration))
            results.append((answer, self._past(b)))
        kept = self.requests[0].cache if self.rows == 1 else None
        if kept:
            told = len(self.turns[0].ids) + len(self._kept_ids(0))
            kept.arrays, kept.length = self.state.cache, told + int(self.ended[0] and self.stopped[0] is None)
        return results

    def _kept_ids(self, b: int) -> list[int]:
        return self.said[b] if self.stopped[b] is None else self.said[b][: self.stopped[b][0]]

    def _past(self, b: int) -> TurnHistory:
        """The new turn as later ones see it; an answer that was cut off is closed."""
        turn = self.turns[b]
        ids = [*turn.ids[turn.start :], *self._kept_ids(b), conversation.stop_id(self.tokenizer, self.config)]
        query_index = turn.query_index[turn.start :]
        return TurnHistory(ids, query_index + [-1] * (len(ids) - len(query_index)), self.x_q[b, 0])


def bucket(length: int) -> int:
    """The least prompt bucket that holds `length` tokens: multiples of 32 up to 128, then steps of a half and a third more."""
    if length <= 4 * _LENGTH_STEP:
        return -(-length // _LENGTH_STEP) * _LENGTH_STEP
    power = _power_of_two(length)
    return power * 3 // 4 if length <= power * 3 // 4 else power


def cache_bucket(length: int) -> int:
    """Slots of a cache that holds `length` tokens: 128, 192, 256, 384, …; fewer than buckets, so that a growing chat compiles seldom."""
    return max(4 * _LENGTH_STEP, bucket(length))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def stacked(rows: Sequence[np.ndarray], size: int) -> np.ndarray:
    """[size, …]: the rows, then the first one again until the batch is full."""
    return np.stack([*rows, *[rows[0]] * (size - len(rows))])


def _stacked_on_device(rows: Sequence[jax.Array], size: int) -> jax.Array:
    return jnp.stack([*rows, *[rows[0]] * (size - len(rows))])
