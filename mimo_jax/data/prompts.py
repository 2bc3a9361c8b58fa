"""Visual prompts: samples them from a mask and encodes them for the model.

Axis letters: P prompt tokens (PromptConfig.max_tokens).

Prompts are in pixels of the original image (as in geometry.py). Only `draw_prompts` simulates a user, for training, evaluation and
viewing; records contain only masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from mimo_jax.config import PROMPT_KINDS
from mimo_jax.errors import UserError
from mimo_jax.geometry import Frame, box_to_corners, mask_to_box, validate_boxes, validate_points, validate_scribbles
from mimo_jax.model_config import PromptConfig

NONE, POINT_IN, POINT_OUT, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT, SCRIBBLE = range(6)  # values of prompt_kind
_UNUSED, _NOT_A_POINT = -2, -1  # labels of SAM's point prompts
_SAM_LABELS = np.array([_UNUSED, 1, 0, 2, 3, 1])  # of each prompt kind

_GRID = 128  # cells along the longer side of the crop in which strokes are drawn
_NEGATIVE = 0.3  # share of point prompts with an additional point outside
_JITTER, _JITTER_MAX = 0.1, 20.0  # a box's edges move by up to this share of its side, and this many pixels
_STEPS = 24  # vertices in each direction from a scribble's start


class PromptError(UserError):
    """A prompt that cannot be read, drawn or encoded; one line with the remedy."""


@dataclass
class Prompts:
    """The prompts of one turn on one image, in pixels of the original image."""

    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))  # [n, 3] x, y, label (1 in, 0 out)
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))  # [n, 4] x0, y0, x1, y1, half-open
    scribbles: list[np.ndarray] = field(default_factory=list)  # each [m, 2] x, y

    def __bool__(self) -> bool:
        return bool(len(self.points) or len(self.boxes) or self.scribbles)

    def kinds(self) -> set[str]:
        """The kinds of PROMPT_KINDS that occur."""
        counts = {"point": len(self.points), "box": len(self.boxes), "scribble": len(self.scribbles)}
        return {kind for kind, count in counts.items() if count}

    def tokens(self, cfg: PromptConfig) -> int:
        """The number of prompt tokens that the marks need."""
        return len(self.points) + 2 * len(self.boxes) + cfg.scribble_points * len(self.scribbles)


def joined(prompts: Sequence[Prompts]) -> Prompts:
    """All marks of several prompts, in order."""
    return Prompts(
        points=np.concatenate([p.points for p in prompts]),
        boxes=np.concatenate([p.boxes for p in prompts]),
        scribbles=[scribble for p in prompts for scribble in p.scribbles],
    )


def draw_prompts(
    mask: np.ndarray, rng: np.random.Generator, kinds: Sequence[str] = PROMPT_KINDS, meant: np.ndarray | None = None
) -> Prompts:
    """A random prompt for the structure `mask`, bool [H, W], as a user might draw it; of one kind, uniformly sampled from `kinds`.

    point: one to three inside, preferably far from the border, sometimes with one just outside. box: tight, with jittered edges.
    scribble: a smooth stroke near the middle. meant: everything that the turn points at, bool [H, W], which no point outside is on; None:
    `mask`. The same masks and rng state give the same prompt. Raises PromptError for an empty mask or an unknown kind.
    """
    unknown = sorted(set(kinds) - set(PROMPT_KINDS))
    if unknown or not kinds:
        raise PromptError(f"prompt kind {', '.join(unknown) or 'missing'}; use some of {', '.join(PROMPT_KINDS)}")
    mask = np.asarray(mask, bool)
    box = mask_to_box(mask)
    if box is None:
        raise PromptError("a prompt cannot be drawn from an empty mask")
    x0, y0, x1, y1 = box
    kind = kinds[int(rng.integers(len(kinds)))]
    if kind == "box":
        return Prompts(boxes=_jittered(box, *mask.shape, rng)[None])
    crop = mask[y0:y1, x0:x1]
    depth, step = _depth(crop)
    if kind == "scribble":
        return Prompts(scribbles=[_pixels(_stroke(depth, rng), crop, step) + (x0, y0)])
    cells = _deep_cells(depth, int(rng.integers(1, 4)), rng)
    points = np.column_stack([_pixels(cells, crop, step) + (x0, y0), np.ones(len(cells))])
    if rng.random() < _NEGATIVE:
        points = np.concatenate([points, _outside(mask if meant is None else meant, box, rng)])
    return Prompts(points=points)


def draw_outside(mask: np.ndarray, rng: np.random.Generator, meant: np.ndarray) -> Prompts:
    """One point outside `meant`, bool [H, W]: with equal probability near the structure `mask`, a part of it, or anywhere in the image.
    Empty if none is found."""
    box = mask_to_box(mask) if rng.random() < 0.5 else (0, 0, mask.shape[1], mask.shape[0])
    return Prompts(points=_outside(meant, box, rng))


def prompts_from_mask(mask: np.ndarray) -> Prompts:
    """A user's mask (a mask image, a decoded COCO RLE, a painted stroke), bool [H, W], as a scribble through it; deterministic. Raises
    PromptError if it is empty."""
    return draw_prompts(mask, np.random.default_rng(0), ("scribble",))


def _jittered(box: tuple[int, int, int, int], height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """`box` with jittered edges: float [4], inside the image, at least half a pixel wide and high."""
    x0, y0, x1, y1 = box
    reach = np.minimum(_JITTER * np.array([x1 - x0, y1 - y0] * 2), _JITTER_MAX)
    moved = np.array(box) + rng.uniform(-1, 1, 4) * reach
    return np.clip(moved, 0, [width, height, width, height])


def _depth(crop: np.ndarray) -> tuple[np.ndarray, int]:
    """(float64 [h, w] distance of each cell to the outside, in cells, 0 outside; pixels along a cell). A cell belongs to
    the structure if any of its pixels does, so that thin vessels stay connected; everything beyond the crop is outside."""
    step = -(-max(crop.shape) // _GRID)
    height, width = (-(-side // step) for side in crop.shape)
    if step > 1:
        padded = np.zeros((height * step, width * step), bool)
        padded[: crop.shape[0], : crop.shape[1]] = crop
        crop = padded.reshape(height, step, width * step).any(1).reshape(height, width, step).any(2)
    framed = np.zeros((height + 2, width + 2), bool)
    framed[1:-1, 1:-1] = crop
    return ndimage.distance_transform_edt(framed)[1:-1, 1:-1], step


def _deep_cells(depth: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Up to `count` different cells [n, 2] (row, column), drawn in proportion to depth squared."""
    total = np.cumsum(np.square(depth).ravel())
    picked = np.searchsorted(total, rng.random(count) * total[-1], side="right")
    return np.column_stack(np.unravel_index(np.unique(picked), depth.shape))


def _pixels(cells: np.ndarray, crop: np.ndarray, step: int) -> np.ndarray:
    """Cells [n, 2] (row, column) -> [n, 2] (x, y): for each cell, the pixel inside the structure that is nearest to its centre."""
    found = np.empty((len(cells), 2))
    for i, (row, col) in enumerate(cells):
        top, left = row * step, col * step
        ys, xs = np.nonzero(crop[top : top + step, left : left + step])
        nearest = np.argmin((ys - (step - 1) / 2) ** 2 + (xs - (step - 1) / 2) ** 2)
        found[i] = left + xs[nearest], top + ys[nearest]
    return found


def _outside(mask: np.ndarray, box: tuple[int, int, int, int], rng: np.random.Generator) -> np.ndarray:
    """[1, 3] a random point outside the structure, within its box enlarged by a quarter (and 2 pixels); [0, 3] if none is found."""
    x0, y0, x1, y1 = box
    reach_x, reach_y = 2 + (x1 - x0) // 4, 2 + (y1 - y0) // 4
    xs = rng.integers(max(0, x0 - reach_x), min(mask.shape[1], x1 + reach_x), 16)
    ys = rng.integers(max(0, y0 - reach_y), min(mask.shape[0], y1 + reach_y), 16)
    free = np.flatnonzero(~mask[ys, xs])[:1]
    return np.column_stack([xs[free], ys[free], np.zeros(len(free))])


def _stroke(depth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cells [m, 2] (row, column) of a smooth walk through the structure: from a deep cell in two opposite directions."""
    start = _deep_cells(depth, 1, rng)[0]
    stride = max(1.0, 0.04 * max(depth.shape))
    heading = _longest_heading(depth, start, stride, rng.uniform(0, math.pi))
    ahead = _walk(depth, start, heading, stride, int(rng.integers(_STEPS // 3, _STEPS + 1)), rng)
    behind = _walk(depth, start, heading + math.pi, stride, int(rng.integers(_STEPS // 3, _STEPS + 1)), rng)
    return np.array([*behind[::-1], tuple(start), *ahead], int)


def _longest_heading(depth: np.ndarray, start: np.ndarray, stride: float, first: float) -> float:
    """Returns the one of 8 headings whose straight line through `start` stays inside longest in both directions, so that the stroke
    follows the structure's length. first: the first heading in radians."""
    headings = first + np.arange(8) * (math.pi / 8)
    runs = np.zeros(8)
    for sign in (1, -1):
        reach = sign * stride * np.arange(1, 9)
        rows = np.rint(start[0] + np.sin(headings)[:, None] * reach).astype(int)
        cols = np.rint(start[1] + np.cos(headings)[:, None] * reach).astype(int)
        valid = (rows >= 0) & (rows < depth.shape[0]) & (cols >= 0) & (cols < depth.shape[1])
        inside = valid & (depth[np.clip(rows, 0, depth.shape[0] - 1), np.clip(cols, 0, depth.shape[1] - 1)] > 0)
        runs += np.logical_and.accumulate(inside, axis=1).sum(1)
    return float(headings[int(np.argmax(runs))])


def _walk(
    depth: np.ndarray, start: np.ndarray, heading: float, stride: float, steps: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Up to `steps` cells: each step turns by at most 36 degrees towards the deepest cell, with tremor; the walk ends at the structure's
    border."""
    height, width = depth.shape
    row, col = float(start[0]), float(start[1])
    cells: list[tuple[int, int]] = []
    for tremor in rng.normal(0, 0.1, steps).tolist():
        best, best_turn = 0.0, 0.0
        for turn in (0.0, -0.3, 0.3, -0.6, 0.6):
            r = round(row + stride * math.sin(heading + turn + tremor))
            c = round(col + stride * math.cos(heading + turn + tremor))
            if 0 <= r < height and 0 <= c < width:
                value = depth.item(r, c) * (1 - 0.25 * abs(turn))
                if value > best:
                    best, best_turn = value, turn
        if best == 0.0:
            break
        heading += best_turn + tremor
        row, col = row + stride * math.sin(heading), col + stride * math.cos(heading)
        cells.append((round(row), round(col)))
    return cells


def encode_prompts(prompts: Prompts, vision_frame: Frame, cfg: PromptConfig) -> tuple[np.ndarray, np.ndarray]:
    """(xy float32 [P, 2] in pixels of the CLIP frame, kind int32 [P]): one token for a point, two for a box (its corners),
    `cfg.scribble_points` for a scribble; unused tokens are 0 with kind NONE.

    Raises GeometryError for a prompt off the image, PromptError for more than P = cfg.max_tokens tokens, or for points outside alone.
    """
    height, width = vision_frame.height, vision_frame.width
    points = validate_points(prompts.points, height, width)
    boxes = validate_boxes(prompts.boxes, height, width)
    scribbles = validate_scribbles(prompts.scribbles, height, width)
    parts = [points[:, :2], box_to_corners(boxes).reshape(-1, 2), *(_resample(s, cfg.scribble_points) for s in scribbles)]
    kinds = [
        *np.where(points[:, 2] == 1, POINT_IN, POINT_OUT).tolist(),
        *[BOX_TOP_LEFT, BOX_BOTTOM_RIGHT] * len(boxes),
        *[SCRIBBLE] * (len(scribbles) * cfg.scribble_points),
    ]
    if len(kinds) > cfg.max_tokens:
        raise PromptError(
            f"{len(points)} points, {len(boxes)} boxes and {len(scribbles)} scribbles need {len(kinds)} prompt tokens; this "
            f"model accepts {cfg.max_tokens} per turn (a point 1, a box 2, a scribble {cfg.scribble_points}): give fewer"
        )
    if len(points) and not (points[:, 2] == 1).any() and not len(boxes) and not scribbles:
        raise PromptError("only say what is not meant (points with label 0); add a point, box or scribble on what is meant")
    xy, kind = np.zeros((cfg.max_tokens, 2), np.float32), np.zeros(cfg.max_tokens, np.int32)
    xy[: len(kinds)] = vision_frame.to_frame(np.concatenate(parts))
    kind[: len(kinds)] = kinds
    return xy, kind


def sam_points(xy: np.ndarray, kind: np.ndarray, vision_frame: Frame, sam_frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """`encode_prompts`' tokens as points for SAM: (xy float32 [P + 1, 2] in pixels of the SAM frame, labels int32 [P + 1]: 1 in, 0
    out, 2 and 3 a box's corners, -2 unused). A scribble is points in; points without a box end with -1, as SAM was trained."""
    labels = _SAM_LABELS[kind]
    end = _NOT_A_POINT if (labels >= 0).any() and (labels <= 1).all() else _UNUSED
    at = sam_frame.to_frame(vision_frame.from_frame(xy))
    return np.pad(at, [(0, 1), (0, 0)]).astype(np.float32), np.append(labels, end).astype(np.int32)


def _resample(line: np.ndarray, count: int) -> np.ndarray:
    """[m, 2] -> [count, 2], equally spaced along the line, from its first to its last point."""
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])
    at = np.linspace(0, along[-1], count)
    return np.column_stack([np.interp(at, along, line[:, 0]), np.interp(at, along, line[:, 1])])
