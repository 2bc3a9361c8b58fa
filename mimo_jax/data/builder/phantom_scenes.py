"""Five kinds of phantom: what each may show (`ANATOMY`), and how each is painted.

CT, MR and chest X-ray follow the radiological convention: the patient's right is on the image's left. Bodies are
schematic (small organs are drawn larger than life, so that a coarse mask grid can outline them). Each painter draws
unlabelled surroundings whose intensities overlap those of labelled structures, so that no threshold finds a structure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from mimo_jax.data.builder.phantom_shapes import PhantomScene, Shape, smooth_field


@dataclass(frozen=True)
class Anatomy:
    """The structures that phantoms of one modality are labelled with, and how often each is present."""

    share: float  # share of all phantoms
    organs: dict[str, float]  # organ → probability that it is the one missing (at most one is)
    lesion: str
    max_lesions: int  # 0 .. max_lesions lesions, equally likely
    home: str = ""  # the organ that contains all lesions; never missing if there are lesions

    def plan(self, rng: np.random.Generator) -> dict[str, int]:
        """Entity → number of instances, for the entities that are present."""
        lesions = int(rng.integers(self.max_lesions + 1))
        draw, missing = rng.random(), ""
        for organ, probability in self.organs.items():
            if 0 <= draw < probability and not (lesions and organ == self.home):
                missing = organ
            draw -= probability
        counts = {organ: 1 for organ in self.organs if organ != missing}
        return {**counts, self.lesion: lesions} if lesions else counts

    def presence(self) -> dict[str, float]:
        """Entity → the share of this modality's phantoms that show it."""
        none = 1 / (self.max_lesions + 1)
        organs = {organ: 1 - p * (none if organ == self.home else 1) for organ, p in self.organs.items()}
        return {**organs, self.lesion: 1 - none}


ANATOMY = {
    "CT": Anatomy(
        0.28, {"liver": 0.4, "spleen": 0.15, "left kidney": 0.15, "right kidney": 0.15, "aorta": 0.15}, "liver cyst", 2, home="liver"
    ),
    "X-ray": Anatomy(0.22, {"left lung": 0.25, "right lung": 0.25, "heart": 0.25}, "lung nodule", 2),
    "MR": Anatomy(0.17, {"left lateral ventricle": 0.3, "right lateral ventricle": 0.3}, "brain tumor", 2),
    "fundus": Anatomy(0.17, {"optic disc": 0.3, "macula": 0.3}, "hemorrhage", 2),
    "ultrasound": Anatomy(0.16, {"gallbladder": 0.4, "portal vein": 0.3}, "gallstone", 2, home="gallbladder"),
}


def _scene(rng, height, width, background, *, scale=(0.88, 1.04), reach=(0.9, 0.9), turn=8) -> PhantomScene:
    """A body of random scale, rotation and position. reach: the distance from its centre, in body units along x and y, that must stay
    inside the image."""
    size = rng.uniform(*scale)
    half = min(height, width) / 2
    slack = (max(0.06 * half, width / 2 - reach[0] * size * half), max(0.06 * half, height / 2 - reach[1] * size * half))
    shift = (rng.uniform(-1, 1) * slack[0], rng.uniform(-1, 1) * slack[1])
    return PhantomScene(rng, height, width, scale=size, shift=shift, turn=np.deg2rad(rng.uniform(-turn, turn)), background=background)


def _texture(scene: PhantomScene, base: float, size: float, cells: int = 18) -> np.ndarray:
    """float32 [H, W]: an intensity with fine smooth grain."""
    return np.float32(base) + np.float32(size) * smooth_field(scene.rng, scene.height, scene.width, cells)


def _twins(rng) -> tuple[float, float]:
    """Linear size factors of a left and a right organ: one of them about 1.4 to 1.9 times the other's area."""
    log = rng.choice([-1, 1]) * rng.uniform(0.09, 0.16)
    return float(np.exp(log)), float(np.exp(-log))


def _ct(rng, height: int, width: int, counts: dict[str, int]) -> PhantomScene:
    """Axial abdomen."""
    cysts = counts.get("liver cyst", 0)
    scene = _scene(rng, height, width, 0.03, scale=(0.88 + 0.03 * cysts, 1.06), reach=(0.88, 0.72))
    scene.paint(scene.shape((0, 0), (1.08, 0.88), wobble=0.03, jitter=0, size=0.02), 0.30, edge=1.5)
    scene.paint(scene.shape((0, -0.02), (0.98, 0.78), wobble=0.03, jitter=0, size=0.02), _texture(scene, 0.42, 0.035))
    for side in (-1, 1):  # ribs
        for by in rng.uniform(-0.45, 0.5, 3):
            at = (side * 0.93 * np.sqrt(1 - (by / 0.76) ** 2), by)
            scene.paint(scene.shape(at, (0.03, 0.08), angle=side * by, jitter=0.02), 1.0)
    for _ in range(int(rng.integers(2, 5))):  # bowel, some of it with gas or contrast
        at, radius = (rng.uniform(-0.5, 0.6), rng.uniform(-0.5, 0.25)), rng.uniform(0.07, 0.15)
        scene.paint(scene.shape(at, (radius, radius * 1.2), wobble=0.15), rng.choice([0.55, 0.62, 0.5, 0.06, 0.92]))
    if rng.random() < 0.75:
        scene.paint(scene.shape((0.36, -0.4), (0.24, 0.16), angle=0.4, wobble=0.12), rng.choice([0.5, 0.08, 0.85]))  # stomach
    scene.paint(scene.shape((0, 0.58), (0.19, 0.16), wobble=0.1, jitter=0.02), 0.98)  # vertebra
    scene.paint(scene.shape((0, 0.60), (0.12, 0.09), wobble=0.1, jitter=0.02), 0.70)
    scene.paint(scene.shape((0, 0.76), (0.05, 0.10), jitter=0.01), 0.95)
    for side in (-1, 1):  # back muscles
        scene.paint(scene.shape((side * 0.27, 0.68), (0.13, 0.09), jitter=0.02), 0.50)

    if "liver" in counts:
        shape = scene.shape((-0.46, -0.12), (0.37 + 0.02 * cysts, 0.42 + 0.02 * cysts), angle=0.25, wobble=0.08, jitter=0.12, size=0.14)
        scene.add("liver", shape, _texture(scene, rng.uniform(0.55, 0.6), 0.03, 26))
    if "spleen" in counts:
        scene.add("spleen", scene.shape((0.68, -0.02), (0.21, 0.35), angle=-0.15, bend=0.35, size=0.15), rng.uniform(0.66, 0.71))
    sizes = _twins(rng)
    for side, entity, size in ((1, "left kidney", sizes[0]), (-1, "right kidney", sizes[1])):
        if entity in counts:
            shape = scene.shape(
                (side * 0.43, 0.42), (0.205 * size, 0.27 * size), angle=side * 0.3, bend=side * 0.35, wobble=0.04, size=0.08
            )
            scene.add(entity, shape, rng.uniform(0.8, 0.86))
            pelvis = Shape(shape.x - side * 0.2 * shape.a, shape.y, 0.3 * shape.a, 0.42 * shape.b, shape.angle)
            scene.paint(pelvis, 0.5, edge=2.0)
    if "aorta" in counts:
        scene.add("aorta", scene.shape((0.06, 0.25), (0.165, 0.165), wobble=0.03, jitter=0.04, min_radii=1.0), rng.uniform(0.92, 1.0))
    scene.lesions("liver cyst", cysts, scene.structures[:1], lambda r: r.uniform(0.2, 0.28), largest=0.12, wobble=0.05)
    return scene


def _xray(rng, height: int, width: int, counts: dict[str, int]) -> PhantomScene:
    """Frontal chest."""
    nodules = counts.get("lung nodule", 0)
    low = 0.86 + 0.03 * nodules + (0.04 if nodules > 1 and len(counts) < 4 else 0)
    scene = _scene(rng, height, width, rng.uniform(0.05, 0.15), scale=(low, 1.06), reach=(0.74, 0.72))
    bx, by = scene.body_coordinates()
    torso = scene.shape((0, 1.0), (0.98, 1.85), wobble=0.02, jitter=0, size=0.03)
    scene.paint(torso, 0.62 + 0.10 * by, edge=3.0)
    scene.paint(scene.shape((0, -0.75), (0.2, 0.5), jitter=0.02), 0.66, edge=3.0)  # neck
    sizes = _twins(rng)
    fields = []
    for side, entity, size in ((1, "left lung", sizes[0]), (-1, "right lung", sizes[1])):
        shape = scene.shape((side * 0.42, -0.03), (0.29 * size, 0.56 * size), angle=side * -0.14, bend=side * -0.15, wobble=0.05, size=0.1)
        if entity in counts:
            value = rng.uniform(0.2, 0.28) + 0.06 * by + 0.025 * smooth_field(rng, height, width, 14)
            fields.append(scene.add(entity, shape, value, edge=2.0))
        else:
            scene.paint(shape, 0.74, edge=4.0)  # a lung without air
    for side in (-1, 1):  # diaphragm
        scene.paint(scene.shape((side * 0.42, 0.92), (0.5, 0.34), jitter=0.05), 0.84, edge=2.5, opacity=0.0 if rng.random() < 0.5 else 0.7)
    scene.paint(scene.shape((0, 0), (0.1, 1.2), jitter=0.02), 0.74, edge=4.0)  # spine and mediastinum
    if "heart" in counts:
        scene.add("heart", scene.shape((0.16, 0.32), (0.31, 0.29), angle=0.5, wobble=0.06, size=0.12), rng.uniform(0.82, 0.9), edge=2.0)
    ribs = np.sin(np.float32(2 * np.pi * rng.uniform(2.6, 3.4)) * (by + np.float32(0.35) * bx * bx) + np.float32(rng.uniform(0, 6)))
    scene.image += np.float32(rng.uniform(0.05, 0.09)) * np.clip(ribs - 0.45, 0, 1) * (np.abs(bx) < 0.85)
    for side in (-1, 1):  # clavicles
        scene.paint(scene.shape((side * 0.4, -0.62), (0.36, 0.035), angle=side * -0.2, jitter=0.03), 0.8, opacity=0.6)
    scene.lesions("lung nodule", nodules, fields, lambda r: r.uniform(0.68, 0.8), largest=0.105, wobble=0.06, edge=2.0)
    return scene


def _mr(rng, height: int, width: int, counts: dict[str, int]) -> PhantomScene:
    """Axial brain, T1 with contrast agent: fluid dark, tumor bright."""
    scene = _scene(rng, height, width, 0.03, scale=(0.86, 1.02), reach=(0.74, 0.86))
    bx, by = scene.body_coordinates()
    scene.paint(scene.shape((0, 0), (0.84, 1.0), wobble=0.02, jitter=0, size=0.02), rng.uniform(0.8, 1.0))  # scalp
    scene.paint(scene.shape((0, 0), (0.76, 0.92), wobble=0.02, jitter=0, size=0.01), 0.08)  # skull
    folds = smooth_field(rng, height, width, 16)
    brain = scene.shape((0, 0), (0.69, 0.85), wobble=0.02, jitter=0, size=0.01)
    scene.paint(brain, 0.42 + 0.07 * np.clip(folds, -1, 1))
    scene.paint(scene.shape((0, 0), (0.54, 0.68), wobble=0.14, jitter=0.02), 0.60 + 0.03 * folds, edge=5.0)  # white matter
    scene.image *= 1 - np.float32(0.75) * ((np.abs(bx) < 0.02) & (np.abs(by) < 0.84))  # midline
    for _ in range(int(rng.integers(2, 5))):  # dark sulci at the rim
        theta = rng.uniform(0, 2 * np.pi)
        at = (0.62 * np.cos(theta), 0.77 * np.sin(theta))
        scene.paint(scene.shape(at, (0.11, 0.06), angle=theta, wobble=0.2), 0.15, edge=2.0)
    sizes = _twins(rng)
    push = rng.uniform(-0.15, 0.15)  # along the midline, the same for both
    for side, entity, size in ((1, "left lateral ventricle", sizes[0]), (-1, "right lateral ventricle", sizes[1])):
        if entity in counts:
            shape = scene.shape(
                (side * 0.23, push), (0.16 * size, 0.36 * size), angle=side * 0.2, bend=side * -0.4, wobble=0.05, jitter=0.02, size=0.15
            )
            scene.add(entity, shape, rng.uniform(0.1, 0.18))
    count = counts.get("brain tumor", 0)
    scene.lesions("brain tumor", count, [], lambda r: r.uniform(0.86, 1.0), largest=0.13, wobble=0.12, host=brain)
    return scene


def _fundus(rng, height: int, width: int, counts: dict[str, int]) -> PhantomScene:
    """Retina in colour, of a left or a right eye; the lit disc fills most of the frame."""
    scene = _scene(rng, height, width, (0.02, 0.02, 0.02), scale=(0.92, 1.1), reach=(0.8, 0.8), turn=12)
    bx, by = scene.body_coordinates()
    tint = np.array([rng.uniform(0.62, 0.8), rng.uniform(0.3, 0.42), rng.uniform(0.1, 0.2)], np.float32)
    glow = 1 + 0.22 * smooth_field(rng, height, width, 3) * 0.6 - 0.18 * (bx * bx + by * by)
    scene.paint(scene.shape((0, 0), (0.97, 0.97), wobble=0, jitter=0, size=0), glow[..., None] * tint, edge=2.0)
    eye = 1 if rng.random() < 0.5 else -1  # where the disc lies: nasal
    disc_at = (eye * rng.uniform(0.34, 0.58), rng.uniform(-0.3, 0.3))
    layer = Image.new("L", (width, height))
    draw = ImageDraw.Draw(layer)
    for up in (-1, 1):  # the vessel arcades leave the disc and arch round the macula
        for spread in rng.uniform(0.2, 0.75, 3):
            t = np.linspace(0, 1, 14)
            vx = disc_at[0] - eye * (1.35 * t * t - 0.35 * spread * np.sin(3 * t))
            vy = disc_at[1] + up * spread * np.sin(2.2 * t) * rng.uniform(0.8, 1.2) + 0.03 * np.sin(9 * t + spread)
            draw.line([scene.to_pixels(x, y) for x, y in zip(vx, vy, strict=True)], fill=int(rng.integers(130, 230)), width=2)
    vessels = np.asarray(layer, np.float32)[..., None] / 255 * (bx * bx + by * by < 0.9)[..., None]
    scene.image *= 1 - vessels * np.array([0.35, 0.55, 0.5], np.float32)
    if rng.random() < 0.35:  # a scar: pale, larger than the disc, mottled
        at = (-eye * rng.uniform(0.0, 0.6), rng.choice([-1, 1]) * rng.uniform(0.45, 0.65))
        scar = scene.shape(at, rng.uniform(0.15, 0.3, 2), angle=rng.uniform(0, 3), wobble=0.3)
        scene.paint(scar, _texture(scene, 0.8, 0.12)[..., None] * np.float32([1.2, 1.0, 0.6]), edge=3.0)
    for _ in range(int(rng.integers(1, 4))):  # hard exudates and reflexes: bright, not labelled
        theta, rho = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.85)
        radii = rng.uniform(0.04, 0.09, 2)
        scene.paint(Shape(*scene.to_pixels(rho * np.cos(theta), rho * np.sin(theta)), *(scene.unit * radii)), (0.95, 0.85, 0.5), edge=2.0)
    if rng.random() < 0.7:  # light at the rim
        theta = rng.uniform(0, 2 * np.pi)
        at = scene.to_pixels(0.93 * np.cos(theta), 0.93 * np.sin(theta))
        scene.paint(Shape(*at, 0.10 * scene.unit, 0.4 * scene.unit, theta + scene.turn), (1.0, 0.85, 0.6), edge=6.0, opacity=0.8)

    if "optic disc" in counts:
        shape = scene.shape(disc_at, (0.18, 0.2), wobble=0.03, jitter=0, size=0.13)
        scene.add("optic disc", shape, (0.98, 0.82, 0.48), edge=2.0)
        scene.paint(Shape(shape.x, shape.y, shape.a * 0.4, shape.b * 0.4), (1.0, 0.96, 0.8), edge=2.0)
    if "macula" in counts:
        at = (disc_at[0] - eye * rng.uniform(0.62, 0.8), disc_at[1] + rng.uniform(-0.08, 0.2))
        shape = scene.shape(at, (0.2, 0.2), wobble=0.03, jitter=0, size=0.13)
        scene.add("macula", shape, tint * np.float32([0.55, 0.42, 0.45]), edge=5.0)
        scene.paint(Shape(shape.x, shape.y, 2.0, 2.0), tint * 1.2, edge=2.0)  # the foveal reflex
    retina = Shape(*scene.centre, 0.9 * scene.unit, 0.9 * scene.unit)
    count = counts.get("hemorrhage", 0)
    scene.lesions("hemorrhage", count, [], lambda r: (r.uniform(0.3, 0.4), 0.03, 0.04), largest=0.12, wobble=0.18, host=retina)
    return scene


def _ultrasound(rng, height: int, width: int, counts: dict[str, int]) -> PhantomScene:
    """Right upper abdomen through a curved probe: a fan of liver with gallbladder and portal vein."""
    scene = _scene(rng, height, width, 0.02, scale=(0.92, 1.08), reach=(0.9, 0.94), turn=8)
    bx, by = scene.body_coordinates()
    apex = np.float32(-1.75 + rng.uniform(-0.2, 0.1))
    depth, angle = np.hypot(bx, by - apex), np.arctan2(bx, by - apex)
    fan = (depth > 0.85) & (depth < 2.7) & (np.abs(angle) < rng.uniform(0.48, 0.62))
    scene.image += fan * (0.45 + 0.10 * smooth_field(rng, height, width, 5))
    for near in rng.uniform(0.9, 1.15, 2):  # skin and fascia
        scene.image += 0.35 * fan * (np.abs(depth - near) < 0.035)
    far = rng.uniform(2.3, 2.55)  # diaphragm
    scene.image += 0.45 * fan * (np.abs(depth - far - 0.15 * bx) < 0.04)
    for _ in range(int(rng.integers(1, 4))):  # bright and dark patches of tissue
        at = (rng.uniform(-0.7, 0.7), rng.uniform(-0.5, 0.7))
        patch = scene.shape(at, rng.uniform(0.06, 0.16, 2), angle=rng.uniform(0, 3), wobble=0.2)
        scene.paint(patch, rng.choice([0.75, 0.85, 0.2, 0.28]), edge=5.0, opacity=0.6)
    side, stones = 1 if rng.random() < 0.5 else -1, counts.get("gallstone", 0)
    if "portal vein" in counts:
        at = (side * 0.4, rng.uniform(-0.35, 0.5))
        shape = scene.shape(at, (0.34, 0.16), angle=side * rng.uniform(-0.6, 0.6), wobble=0.04, size=0.15)
        scene.paint(Shape(shape.x, shape.y, shape.a + 3.2, shape.b + 3.2, shape.angle, shape.harmonics), 0.95, edge=2.0)  # its wall
        scene.add("portal vein", shape, 0.16)
    if "gallbladder" in counts:
        at = (-side * rng.uniform(0.2, 0.4), rng.uniform(-0.35, 0.45))
        shape = scene.shape(at, (0.29 + 0.02 * stones, 0.4 + 0.02 * stones), angle=rng.uniform(-0.9, 0.9), wobble=0.07, size=0.12)
        _beam(scene, shape, apex, 0.18, bx, by, depth, angle)
        scene.add("gallbladder", shape, 0.07, edge=2.0)
        bag = scene.structures[-1]
        scene.lesions("gallstone", stones, [bag], lambda r: r.uniform(0.85, 1.0), largest=0.105, wobble=0.08)
        for stone in scene.structures[scene.structures.index(bag) + 1 :]:
            _beam(scene, stone.shape, apex, -0.3, bx, by, depth, angle, outside=bag.mask)
    scene.image *= np.where(fan, 1, 0.04)
    for structure in scene.structures:
        structure.mask &= fan
    return scene


def _beam(scene: PhantomScene, shape: Shape, apex, gain: float, bx, by, depth, angle, outside=None) -> None:
    """Brighten (enhancement) or darken (shadow) what lies behind a shape as seen from the probe, except the pixels `outside`."""
    cos, sin = np.cos(scene.turn), np.sin(scene.turn)
    dx, dy = (shape.x - scene.centre[0]) / scene.unit, (shape.y - scene.centre[1]) / scene.unit
    x, y = cos * dx + sin * dy, cos * dy - sin * dx - apex
    behind = (np.abs(angle - np.arctan2(x, y)) < 0.8 * min(shape.a, shape.b) / scene.unit / np.hypot(x, y)) & (depth > np.hypot(x, y))
    if outside is not None:
        behind &= ~outside
    scene.image += np.float32(gain) * behind


PAINTERS: dict[str, Callable[..., PhantomScene]] = {"CT": _ct, "X-ray": _xray, "MR": _mr, "fundus": _fundus, "ultrasound": _ultrasound}
