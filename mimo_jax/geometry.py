"""Coordinates: the only module that converts between the original image and the frames of the vision tower and SAM.

Convention: integer (x, y) is the *centre* of a pixel, x right, y down; an image spans [-0.5, W-0.5] x [-0.5, H-0.5].
A box [x0, y0, x1, y1) is half-open: it covers the pixels x0 … x1-1, and its edges are at x0-0.5 and x1-0.5.
A frame is the square input of a tower: the image resized to `content_height` x `content_width`, placed at
(`offset_x`, `offset_y`). Resizing keeps the edges of the pixel grid, so x is mapped to (x + 0.5)·s - 0.5 + offset,
with s the ratio of the *rounded* sizes, separately for x and y.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mimo_jax.errors import UserError

FITS = ("pad", "stretch", "crop")


class GeometryError(UserError):
    """An invalid size, point, box or scribble; the message says what and where."""


@dataclass(frozen=True)
class Frame:
    """The position of an image of height x width in a square of side x side pixels."""

    height: int  # height of the original image
    width: int
    side: int  # side of the frame
    fit: str  # "pad", "stretch" or "crop"
    content_height: int  # height of the resized image; with "crop" it may exceed `side`
    content_width: int
    offset_x: int = 0  # position of the resized image's left edge in the frame; 0 or, with "crop", negative
    offset_y: int = 0

    @property
    def scale_x(self) -> float:
        return self.content_width / self.width

    @property
    def scale_y(self) -> float:
        return self.content_height / self.height

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the part of the frame that the image covers, from the top left."""
        return min(self.content_height, self.side), min(self.content_width, self.side)

    def to_frame(self, xy: np.ndarray, sam_compat: bool = False) -> np.ndarray:
        """Pixels of the original image [..., 2] -> pixels of the frame, float64 [..., 2]; both (x, y), with integers at pixel centres.

        sam_compat: use SAM's own ResizeLongestSide rule, x·s. SAM's prompt encoder then adds 0.5, as ours does, and so
        uses x·s + 0.5 instead of the exact position (x + 0.5)·s. Source: segment_anything/utils/transforms.py.
        """
        xy, scale, offset = self._operands(xy)
        if sam_compat:
            return xy * scale + offset
        return (xy + 0.5) * scale - 0.5 + offset

    def from_frame(self, xy: np.ndarray, sam_compat: bool = False) -> np.ndarray:
        """Inverse of `to_frame`."""
        xy, scale, offset = self._operands(xy)
        if sam_compat:
            return (xy - offset) / scale
        return (xy + 0.5 - offset) / scale - 0.5

    def _operands(self, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        xy = np.asarray(xy, np.float64)
        if xy.shape[-1:] != (2,):
            raise GeometryError(f"coordinates have shape {list(xy.shape)}; the last axis must be (x, y)")
        return xy, np.array([self.scale_x, self.scale_y]), np.array([self.offset_x, self.offset_y], np.float64)


def vision_frame(height: int, width: int, cfg_side: int, fit: str) -> Frame:
    """The vision frame of an image. fit: "pad" keeps the aspect ratio, makes the longest side cfg_side and pads right and bottom;
    "stretch" fills the square; "crop" (CLIP's own processor) makes the shortest side cfg_side and crops the centre."""
    if fit == "pad":
        return _longest_side(height, width, cfg_side)
    _check_size(height, width, cfg_side)
    if fit == "stretch":
        return Frame(height, width, cfg_side, fit, cfg_side, cfg_side)
    if fit == "crop":
        short = min(height, width)
        content_height, content_width = cfg_side * height // short, cfg_side * width // short
        return Frame(
            height, width, cfg_side, fit, content_height, content_width,
            offset_x=-((content_width - cfg_side) // 2), offset_y=-((content_height - cfg_side) // 2),
        )  # fmt: skip
    raise GeometryError(f"image_fit {fit!r} is unknown; use one of {', '.join(FITS)}")


def sam_frame(height: int, width: int, side: int, fit: str = "pad") -> Frame:
    """The SAM frame of an image. fit: "pad" makes the longest side `side`, rounded as in SAM, and pads right and bottom; "stretch"
    fills the square."""
    return vision_frame(height, width, side, fit)


def _longest_side(height: int, width: int, side: int) -> Frame:
    """Like SAM's rule int(x + 0.5), but with a minimum of 1: SAM's rule gives a 1 x 4000 image 0 rows."""
    _check_size(height, width, side)
    scale = side / max(height, width)
    return Frame(height, width, side, "pad", max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))


def _check_size(height: int, width: int, side: int) -> None:
    if min(height, width, side) < 1:
        raise GeometryError(f"an image of {width}x{height} pixels in a frame of {side}: every side must be at least 1")


def mask_to_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """The smallest half-open box (x0, y0, x1, y1) around a mask, bool [H, W]; None if it is empty."""
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1) if len(rows) else None


def box_to_corners(boxes: np.ndarray) -> np.ndarray:
    """Half-open boxes [..., 4] (x0, y0, x1, y1) -> float64 [..., 2, 2], the points (x, y) of their top-left and bottom-right
    corners, at the outer edges of the covered pixels."""
    boxes = np.asarray(boxes, np.float64)
    return boxes.reshape(*boxes.shape[:-1], 2, 2) - 0.5


def validate_points(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """The points as float64 [n, 3] (x, y, label); raises GeometryError for a wrong shape, NaN, a label other than 1 (inside) or
    0 (outside), or a point outside [-0.5, W-0.5] x [-0.5, H-0.5]."""
    points = _rows(points, 3, "points", "x, y, label")
    for i, (x, y, label) in enumerate(points):
        if label not in (0.0, 1.0):
            raise GeometryError(f"point {i}: label {label:g}; use 1 (inside the structure) or 0 (outside)")
        _check_inside(x, y, height, width, f"point {i}")
    return points


def validate_boxes(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """The half-open boxes as float64 [n, 4] (x0, y0, x1, y1); raises GeometryError for a wrong shape, NaN, a box without area, or
    one that exceeds [0, W] x [0, H]."""
    boxes = _rows(boxes, 4, "boxes", "x0, y0, x1, y1")
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        shown = f"box {i} [{x0:g}, {y0:g}, {x1:g}, {y1:g})"
        if x0 >= x1 or y0 >= y1:
            raise GeometryError(f"{shown} has no area; give x0 < x1 and y0 < y1")
        if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
            raise GeometryError(f"{shown} exceeds the image of {width}x{height} pixels")
    return boxes


def validate_scribbles(scribbles: list[np.ndarray], height: int, width: int) -> list[np.ndarray]:
    """The scribbles as float64 [m, 2] polylines (x, y), m >= 1; raises GeometryError for a wrong shape, NaN, or a vertex outside
    the image."""
    checked = []
    for i, scribble in enumerate(scribbles):
        scribble = _rows(scribble, 2, f"scribble {i}", "x, y")
        if not len(scribble):
            raise GeometryError(f"scribble {i} has no points")
        for x, y in scribble:
            _check_inside(x, y, height, width, f"scribble {i}")
        checked.append(scribble)
    return checked


def _rows(values: np.ndarray, columns: int, what: str, names: str) -> np.ndarray:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise GeometryError(f"{what}: not rows of {columns} numbers ({names})") from None
    if array.size == 0 and array.ndim <= 2 and array.shape[-1] in (0, columns):
        return np.zeros((0, columns))
    if array.ndim != 2 or array.shape[1] != columns:
        raise GeometryError(f"{what}: shape {list(array.shape)}; give rows of {columns} numbers ({names})")
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(1))[0])
        raise GeometryError(f"{what}: row {row} holds {array[row].tolist()}; every number must be finite")
    return array


def _check_inside(x: float, y: float, height: int, width: int, what: str) -> None:
    if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
        raise GeometryError(f"{what}: ({x:g}, {y:g}) is outside the image of {width}x{height} pixels")
