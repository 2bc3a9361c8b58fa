"""Geometry of phantoms: smooth random shapes, smooth random fields, and the scene they are painted into.

Axis letters: H, W image height and width in pixels; h, w those of a shape's window. Coordinates are pixels, x right, y down, integers
are pixel centres. *Body units* are the coordinates of a scene: the body spans about [-1, 1]; its position, size and rotation in the
image belong to the scene.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

MIN_RADIUS = 0.076  # share of the image's longer side; a 64 x 64 mask grid can still outline this well
TRIES = 12  # layouts of an image's lesions that are tried before the whole image is drawn again


class NoRoom(Exception):
    """Something planned does not fit into the layout; another layout is drawn."""


@lru_cache(maxsize=512)
def _bumps(length: int, cells: int) -> np.ndarray:
    """[length, cells + 1] Hann bumps, one per knot, that sum to one everywhere."""
    place = np.linspace(0, cells, length, dtype=np.float32)[:, None] - np.arange(cells + 1, dtype=np.float32)[None]
    return np.where(np.abs(place) < 1, 0.5 + 0.5 * np.cos(np.pi * place), 0).astype(np.float32)


def smooth_field(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """float32 [height, width], a smooth random field of about unit variance with `cells` cells along each side."""
    knots = rng.standard_normal((cells + 1, cells + 1), dtype=np.float32)
    return _bumps(height, cells) @ knots @ _bumps(width, cells).T


@dataclass
class Shape:
    """An ellipse with semi-axes (a, b), rotated by `angle`, its radius modulated by harmonics 2, 3, … of the polar angle, and bent like
    a bean. It is star-shaped about its centre (before bending) and therefore always one piece."""

    x: float
    y: float
    a: float
    b: float
    angle: float = 0.0
    harmonics: np.ndarray = field(default_factory=lambda: np.zeros(0, np.complex64))
    bend: float = 0.0

    def level(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Approximate signed distance to the contour in pixels, positive inside, at points (x, y) that broadcast."""
        cos, sin = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        dx, dy = x - np.float32(self.x), y - np.float32(self.y)
        v = (cos * dy - sin * dx) / np.float32(self.b)
        u = (cos * dx + sin * dy) / np.float32(self.a)
        if self.bend:
            u = u + np.float32(self.bend) * (v * v - np.float32(0.35))
        rho = np.sqrt(u * u + v * v) + np.float32(1e-6)
        radius = np.ones_like(rho)
        if len(self.harmonics):
            direction = (u + 1j * v) / rho
            power = direction
            for amplitude in self.harmonics:
                power = power * direction
                radius += amplitude.real * power.real - amplitude.imag * power.imag
        return (radius - rho) * np.float32(np.sqrt(self.a * self.b))

    def window(self, height: int, width: int, margin: float = 2.0) -> tuple[slice, slice]:
        """The (rows, columns) of the image outside which the shape has no pixel."""
        reach = 1 + np.abs(self.harmonics).sum() + 0.7 * abs(self.bend)
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        half_x = reach * np.hypot(self.a * cos, self.b * sin) + margin
        half_y = reach * np.hypot(self.a * sin, self.b * cos) + margin
        rows = slice(int(max(0, self.y - half_y)), int(max(0, min(height, self.y + half_y + 1))))
        return rows, slice(int(max(0, self.x - half_x)), int(max(0, min(width, self.x + half_x + 1))))


@dataclass(eq=False)
class Structure:
    """A labelled structure of a scene. mask: bool [H, W], its visible part. drawn_px: its area including hidden parts and those outside
    the frame."""

    entity: str
    mask: np.ndarray
    shape: Shape
    drawn_px: float
    parent: Structure | None = None


class PhantomScene:
    """A float32 image [H, W] or [H, W, 3] (nominally 0..1), the position of the body in it, and the labelled structures.

    scale: half the body's extent divided by half the image's shorter side. shift, turn: of the body, in pixels and radians.
    """

    def __init__(self, rng, height: int, width: int, *, scale, shift, turn, background):
        self.rng = rng
        self.height, self.width = height, width
        self.image = np.empty((height, width, *np.shape(background)), np.float32)
        self.image[...] = background
        self.unit = scale * min(height, width) / 2  # pixels per body unit
        self.turn = turn
        self.centre = ((width - 1) / 2 + shift[0], (height - 1) / 2 + shift[1])
        self.min_radius = MIN_RADIUS * max(height, width)
        self.x = np.arange(width, dtype=np.float32)[None, :]
        self.y = np.arange(height, dtype=np.float32)[:, None]
        self.structures: list[Structure] = []

    def to_pixels(self, bx: float, by: float) -> tuple[float, float]:
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        return self.centre[0] + self.unit * (cos * bx - sin * by), self.centre[1] + self.unit * (sin * bx + cos * by)

    def body_coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """Body units of every pixel, each float32 [H, W]."""
        cos, sin = np.float32(np.cos(self.turn) / self.unit), np.float32(np.sin(self.turn) / self.unit)
        dx, dy = self.x - np.float32(self.centre[0]), self.y - np.float32(self.centre[1])
        return cos * dx + sin * dy, cos * dy - sin * dx

    def harmonics(self, wobble: float, count: int = 3) -> np.ndarray:
        """Random amplitudes of harmonics 2 .. count + 1, falling off as 1 / order."""
        size = wobble / np.arange(1, count + 1)
        return (size * np.exp(1j * self.rng.uniform(0, 2 * np.pi, count))).astype(np.complex64)

    def shape(self, at, radii, *, angle=0.0, wobble=0.08, bend=0.0, jitter=0.06, size=0.1, min_radii=0.0) -> Shape:
        """A random shape about `at` with semi-axes `radii`, all in body units and radians, jittered in position and size. Its smallest
        semi-axis is at least `min_radii` times MIN_RADIUS."""
        rng = self.rng
        x, y = self.to_pixels(at[0] + rng.uniform(-jitter, jitter), at[1] + rng.uniform(-jitter, jitter))
        factor = self.unit * np.exp(rng.uniform(-size, size))
        a, b = factor * radii[0] * np.exp(rng.uniform(-0.06, 0.06)), factor * radii[1] * np.exp(rng.uniform(-0.06, 0.06))
        grow = max(1.0, min_radii * self.min_radius / min(a, b))
        return Shape(x, y, a * grow, b * grow, angle + self.turn + rng.uniform(-0.12, 0.12), self.harmonics(wobble), bend)

    def paint(self, shape: Shape, value, *, edge: float = 1.2, opacity: float = 1.0) -> np.ndarray:
        """Blend `value` (a number, a colour, or an array of the image's size) into the shape. Returns the shape's level, [h, w]."""
        window = shape.window(self.height, self.width)
        level = shape.level(self.x[:, window[1]], self.y[window[0]])
        alpha = np.clip(level * np.float32(1 / edge) + np.float32(0.5), 0, 1) * np.float32(opacity)
        value = np.asarray(value, np.float32)
        if value.ndim >= 2:
            value = value[window]
        alpha = alpha[..., None] if self.image.ndim == 3 else alpha
        self.image[window] += alpha * (value - self.image[window])
        return level

    def add(self, entity: str, shape: Shape, value, *, edge: float = 1.2, opacity: float = 1.0, parent=None) -> Structure:
        """Paint a labelled structure. It hides earlier ones, except a lesion's organ, whose mask includes the lesion."""
        level = self.paint(shape, value, edge=edge, opacity=opacity)
        mask = np.zeros((self.height, self.width), bool)
        mask[shape.window(self.height, self.width)] = level > 0
        for other in self.structures:
            if other is not parent:
                other.mask &= ~mask
        if parent is not None:
            parent.mask |= mask
        self.structures.append(Structure(entity, mask, shape, np.pi * shape.a * shape.b, parent))
        return self.structures[-1]

    def lesions(self, entity: str, count: int, organs: list[Structure], value, *, largest: float, wobble=0.1, edge=1.2, host=None) -> None:
        """Add `count` lesions inside `organs` (or inside the unlabelled shape `host`) and apart from all other structures, with radii
        from MIN_RADIUS to `largest` of the longer side. `value(rng)` returns the intensity of each. Raises NoRoom if they do not fit."""
        hosts = [host] if host else [organ.shape for organ in organs]
        clear = [s.shape for s in self.structures if s not in organs]
        for x, y, radius, which in self._place_circles(count, hosts, clear, largest):
            squash = np.exp(self.rng.uniform(-0.12, 0.12))
            shape = Shape(x, y, radius * squash, radius / squash, self.rng.uniform(0, np.pi), self.harmonics(wobble))
            self.add(entity, shape, value(self.rng), edge=edge, parent=organs[which] if organs else None)

    def _place_circles(self, count: int, hosts: list[Shape], clear: list[Shape], largest: float) -> list[tuple[float, float, float, int]]:
        """`count` circles (x, y, radius, index of its host), apart from each other, inside their hosts and the frame and all but
        clear of the shapes `clear`. Later tries take smaller ones and pack them along the rim."""
        long_side = max(self.height, self.width)
        for attempt in range(TRIES):
            placed: list[tuple[float, float, float, int]] = []
            for _ in range(count):
                spread = self.rng.uniform(0, 1) * max(0.0, 1 - attempt / (TRIES - 3))
                radius = long_side * (MIN_RADIUS + 0.002 + spread * (largest - MIN_RADIUS))
                which = int(self.rng.integers(len(hosts)))
                host = hosts[which]
                reach = max(host.a, host.b)
                xs, ys = (c + self.rng.uniform(-reach, reach, 240).astype(np.float32) for c in (host.x, host.y))
                depth = host.level(xs, ys)
                good = (depth >= 1.06 * radius) & (xs >= radius) & (xs < self.width - radius) & (ys >= radius) & (ys < self.height - radius)
                for x, y, other, _ in placed:
                    good &= np.hypot(xs - x, ys - y) >= 1.1 * (radius + other)
                for shape in clear:
                    good &= shape.level(xs, ys) <= -0.85 * radius
                found = np.flatnonzero(good)
                if not len(found):
                    break
                best = found[np.argmin(depth[found])] if attempt > TRIES // 2 else found[0]
                placed.append((float(xs[best]), float(ys[best]), radius, which))
            else:
                return placed
        raise NoRoom("lesions")

    def check(self) -> None:
        """Raise NoRoom if too little of a structure is visible because others hide it or it leaves the frame."""
        for structure in self.structures:
            if structure.mask.sum() < (0.95 if structure.parent else 0.7) * structure.drawn_px:
                raise NoRoom(structure.entity)
