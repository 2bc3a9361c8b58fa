"""One batch of requests: aligned, prefilled, decoded in steps, and segmented.

Axis letters: B rows of a batch, T prompt bucket, R turns, Q tokens of one turn's X_q, D width of the language model, S `<SEG>`
slots, m side of the mask decoder's output.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config import Config
from mimo_jax.data import conversation
from mimo_jax.data.prompts import sam_points
from mimo_jax.data.tokenizer import Tokenizer
from mimo_jax.data.transforms import mask_from_logits, preprocess
from mimo_jax.geometry import sam_frame
from mimo_jax.infer.answers.answer import Answer, Entity
from mimo_jax.infer.answers.calibration import Calibration, ConfidenceFeatures
from mimo_jax.infer.answers.familiarity import Familiarity
from mimo_jax.infer.engine.compiled import Engine
from mimo_jax.infer.engine.requests import EncodedImage, EncodedTurn, Request, TurnHistory
from mimo_jax.infer.engine.zoom import crop_around
from mimo_jax.model_config import GROUNDING_TOKENS

_LENGTH_STEP = 32  # prompt buckets: 32, 64, 96, 128, then 192, 256, 384, 512, 768, …
# The end of a text that the next token may still change: an incomplete character, a spelt-out tag (which is dropped), or a space.
_BEGUN = "|".join(sorted({re.escape(tag[:n]) for tag in GROUNDING_TOKENS for n in range(1, len(tag))}, reverse=True))
_UNFINISHED = re.compile(rf"\s*({_BEGUN}|\ufffd*)\s*$")
_STOP_STEP = 8  # tokens between two searches for a stop string


class DecodeBatch:
    """A batch of at most `rows` requests; padding rows generate nothing.

    Call `decode` until `done`, then `finish`; in between, `text` and `decode_masks` return the partial results."""

    def __init__(
        self,
        engine: Engine,
        config: Config,
        tokenizer: Tokenizer,
        calibration: Calibration,
        familiarity: Familiarity,
        requests: Sequence[Request],
        images: Sequence[EncodedImage],
        turns: Sequence[EncodedTurn],
        rows: int,
    ):
        """images: encoded, with their features on the device. The cache of a request is consumed; `finish` sets the new one."""
        self.engine, self.config, self.tokenizer, self.calibration = engine, config, tokenizer, calibration
        self.familiarity = familiarity
        self.requests, self.images, self.turns, self.rows = requests, images, turns, rows
        self.features = [image.features for image in images]  # referenced here, in case the device cache releases them
        self.entities: list[list[Entity]] = [[] for _ in turns]
        self.generated_ids: list[list[int]] = [[] for _ in turns]
        self.stopped: list[tuple[int, int] | None] = [None] * len(turns)  # (ids, characters) before a stop string
        self.done = False

        limits = np.zeros(rows, np.int32)
        limits[: len(turns)] = [turn.limit for turn in turns]
        default, longest = config.generate.max_new_tokens, int(limits.max())
        self.new_tokens = default if longest <= default else bucket(longest)
        self._prefill(limits)

    def _prefill(self, limits: np.ndarray) -> None:
        """Prefill what the cache does not hold: the new turn, or the full conversation."""
        turn_cache = self.requests[0].cache if self.rows == 1 else None
        cache, held, start = (turn_cache.arrays, turn_cache.slots, turn_cache.length) if turn_cache and turn_cache.length else (None, 0, 0)
        if turn_cache:
            turn_cache.release()  # the arrays are donated below; if anything fails, the next turn starts without a cache
        needed = cache_bucket(min(max(len(turn.ids) for turn in self.turns) + self.new_tokens, self.config.model.llm.max_length))
        self.slots = max(held, needed)
        if cache is None:
            cache = self.engine.new_cache(self.rows, self.slots)
        elif held < self.slots:
            cache = self.engine.extend(cache, self.slots)

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
        """X_q of all turns [B, R, Q, D]: for each row those of its earlier turns, then the new one."""
        turns = _power_of_two(1 + max(len(request.past) for request in self.requests))
        if turns == 1:
            return self.x_q
        new = self.x_q[:, 0]
        nothing = jnp.zeros_like(new[0])
        rows = []
        for b in range(self.rows):
            earlier = [turn.x_q for turn in self.requests[b].past] if b < len(self.requests) else []
            rows.append(jnp.stack([*earlier, new[b], *[nothing] * (turns - 1 - len(earlier))]))
        return jnp.stack(rows)

    def decode(self, tokens: int | None = None) -> None:
        """Decode `tokens` more tokens, or to the end."""
        step = min(tokens or self.new_tokens, _STOP_STEP if self._any_stop_strings() else self.new_tokens)
        end = self.new_tokens if tokens is None else min(self.new_tokens, int(self.state.step) + tokens)
        while not self.done and (at := int(self.state.step)) < end:
            self.state = self.engine.decode(self.state, min(end, at + step))
            self._sync()

    def _any_stop_strings(self) -> bool:
        return any(request.sampling.stop for request in self.requests)

    def _sync(self) -> None:
        """Fetch the generated tokens; end the rows that contain a stop string."""
        ids, num_generated, active, self.ended, self.probs = jax.device_get(
            (self.state.ids, self.state.num_generated, self.state.active, self.state.ended, self.state.probs)
        )
        self.generated_ids = [ids[b, : num_generated[b]].tolist() for b in range(len(self.turns))]
        if self._any_stop_strings():
            self.stopped = [self._find_stop(b) for b in range(len(self.turns))]
            active = active & ~np.array([*map(bool, self.stopped), *[False] * (self.rows - len(self.turns))])
            self.state = self.state._replace(active=jnp.asarray(active))
        self.done = not active.any() or int(self.state.step) >= self.new_tokens

    def _find_stop(self, b: int) -> tuple[int, int] | None:
        """(number of ids whose text is completely before the first stop string, characters before it); None if there is no stop string."""
        text = self._parse(self.generated_ids[b])[0]
        found = [at for stop in self.requests[b].sampling.stop if (at := text.find(stop)) >= 0]
        if not found:
            return None
        count = next(n for n in range(len(self.generated_ids[b]), -1, -1) if len(self._parse(self.generated_ids[b][:n])[0]) <= min(found))
        return count, min(found)

    def _parse(self, ids: Sequence[int]) -> tuple[str, list[dict], list[tuple[str, int, int]]]:
        return conversation.parse_ids(self.tokenizer, ids)

    def text(self, b: int) -> str:
        """The final part of row b's text so far, without an end that may still become a stop string or change."""
        text = self._parse_row(b)[0]
        if self.done:
            return text
        num_withheld = max((len(stop) for stop in self.requests[b].sampling.stop), default=1) - 1
        return _UNFINISHED.sub("", text[: len(text) - num_withheld])

    def _parse_row(self, b: int) -> tuple[str, list[dict], list[tuple[str, int, int]]]:
        """Row b's text without tags, its pieces and its phrases, up to a stop string."""
        if self.stopped[b] is None:
            return self._parse(self.generated_ids[b])
        count, characters = self.stopped[b]
        text, pieces, phrases = self._parse(self.generated_ids[b][:count])
        # A stop string may begin within a token: `rest` is the part of that token before it.
        rest = self._parse(self.generated_ids[b])[0][len(text) : characters]
        return text + rest, pieces + [{"text": rest, "seg": None}] * bool(rest), phrases

    def decode_masks(self) -> list[list[Entity]]:
        """The entities of every row so far; one call of the mask decoder segments all new ones."""
        phrases = [self._parse_row(b)[2] for b in range(len(self.turns))]
        counts = [len(self.generated_ids[b]) if self.stopped[b] is None else self.stopped[b][0] for b in range(len(self.turns))]
        seg_positions = [
            [n for n, i in enumerate(ids[:count]) if i == self.tokenizer.seg] for ids, count in zip(self.generated_ids, counts, strict=True)
        ]
        new = [row[len(known) :] for row, known in zip(seg_positions, self.entities, strict=True)]
        if num_masks := max(map(len, new)):
            index = np.zeros((self.rows, _power_of_two(num_masks)), np.int32)
            for b, row in enumerate(new):
                index[b, : len(row)] = row
            features = _stacked_on_device(self.features, self.rows)
            generate = self.config.generate
            points = self._sam_points() if generate.sam_prompts else None
            outputs = self.engine.segment(features, self.state.states, index, sum(map(len, new)), points, generate.refine)
            logits, iou = jax.device_get(outputs)
            for b, row in enumerate(new):
                image = self.images[b]
                for s, position in enumerate(row):
                    k = len(self.entities[b])
                    mask = mask_from_logits(logits[b, s], image.sam_frame, *image.pixels.shape[:2])
                    if generate.zoom:
                        mask = self._zoomed(b, position, logits[b, s], mask)
                    since = seg_positions[b][k - 1] + 1 if k else 0
                    evidence = ConfidenceFeatures.of(logits[b, s], image.sam_frame, iou[b, s], self.probs[b, since : position + 1])
                    spacing = image.picture.spacing_mm
                    self.entities[b].append(Entity.of(k, phrases[b][k][0], mask, evidence, self.calibration, spacing))
        return self.entities

    def _zoomed(self, b: int, position: int, logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The mask of row b's token `position`, decoded again on a crop if it is small; the first one if the crop shows nothing."""
        image, config = self.images[b], self.config
        crop = crop_around(logits, image.sam_frame)
        if crop is None:
            return mask
        pixels = image.pixels[crop]
        views = {name: array[None] for name, array in preprocess(pixels, config.model).items()}
        _, features = self.engine.encode(views, 1)
        states = self.state.states[b : b + 1]
        logits, _ = self.engine.segment(features, states, np.array([[position]], np.int32), 1, None, config.generate.refine)
        size, sam = pixels.shape[:2], config.model.sam
        inside = mask_from_logits(np.asarray(logits[0, 0]), sam_frame(*size, sam.image_size, sam.image_fit), *size)
        if not inside.any():
            return mask
        zoomed = np.zeros_like(mask)
        zoomed[crop] = inside
        return zoomed

    def _sam_points(self) -> tuple[np.ndarray, np.ndarray]:
        """The prompts of every row's new turn for SAM's prompt encoder: xy [B, P + 1, 2], labels [B, P + 1]."""
        points = [
            sam_points(turn.prompt_xy, turn.prompt_kind, image.vision_frame, image.sam_frame)
            for turn, image in zip(self.turns, self.images, strict=True)
        ]
        xy, labels = zip(*points, strict=True)
        return stacked(xy, self.rows), stacked(labels, self.rows)

    def finish(self) -> list[tuple[Answer, TurnHistory]]:
        """The answers with the history that the next turn of each chat needs; stores the KV cache of a request that runs alone."""
        self.decode_masks()
        results = []
        for b, (request, image, turn) in enumerate(zip(self.requests, self.images, self.turns, strict=True)):
            text, pieces, _ = self._parse_row(b)
            parts = [{"text": p["text"]} if p["seg"] is None else {"text": p["text"], "entity_id": p["seg"]} for p in pieces]
            truncated = not self.ended[b] and self.stopped[b] is None
            context = (request.question, image.pixels, turn.prompts, image.picture.grid)
            known = self.familiarity.likeness(turn.question, image.pooled) if self.familiarity else None
            read_as = turn.question if turn.question != request.question else ""
            rest = (bool(self.calibration), self.config.model.max_segs, known, read_as, image.warnings)
            answer = Answer(text, parts, self.entities[b], truncated, *context, *rest)
            results.append((answer, self._turn_history(b)))
        turn_cache = self.requests[0].cache if self.rows == 1 else None
        if turn_cache:
            length = len(self.turns[0].ids) + len(self._kept_ids(0)) + int(self.ended[0] and self.stopped[0] is None)
            turn_cache.arrays, turn_cache.slots, turn_cache.length = self.state.cache, self.slots, length
        return results

    def _kept_ids(self, b: int) -> list[int]:
        return self.generated_ids[b] if self.stopped[b] is None else self.generated_ids[b][: self.stopped[b][0]]

    def _turn_history(self, b: int) -> TurnHistory:
        """The new turn as later turns need it; a truncated answer gets an end token."""
        turn = self.turns[b]
        ids = [*turn.ids[turn.start :], *self._kept_ids(b), conversation.stop_id(self.tokenizer, self.config)]
        query_index = turn.query_index[turn.start :]
        return TurnHistory(ids, query_index + [-1] * (len(ids) - len(query_index)), self.x_q[b, 0])


def bucket(length: int) -> int:
    """The smallest prompt bucket that holds `length` tokens: multiples of 32 up to 128, then 192, 256, 384, 512, …"""
    if length <= 4 * _LENGTH_STEP:
        return -(-length // _LENGTH_STEP) * _LENGTH_STEP
    power = _power_of_two(length)
    return power * 3 // 4 if length <= power * 3 // 4 else power


def cache_bucket(length: int) -> int:
    """Slots of a cache for `length` tokens: 128, 192, 256, …; fewer sizes than prompt buckets, so that a growing chat seldom compiles."""
    return max(4 * _LENGTH_STEP, bucket(length))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def stacked(rows: Sequence[np.ndarray], size: int) -> np.ndarray:
    """[size, …]: the rows, padded with copies of the first one."""
    return np.stack([*rows, *[rows[0]] * (size - len(rows))])


def _stacked_on_device(rows: Sequence[Any], size: int) -> Any:
    """Arrays, or tuples of arrays, as rows of a batch of `size`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows, *[rows[0]] * (size - len(rows)))
