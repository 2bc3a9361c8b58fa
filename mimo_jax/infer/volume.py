"""Ask one question about every slice of a volume and merge the masks by entity name into structures.

Axis letters: F slices, H, W height and width of each in pixels; S structures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pycocotools import mask as coco
from tqdm import tqdm

from mimo_jax.data.images.image import Volume
from mimo_jax.data.overlay import draw_sheet
from mimo_jax.infer.answers.answer import Answer, left_out_notes
from mimo_jax.infer.answers.asked import unanswered
from mimo_jax.infer.answers.calibration import Calibration
from mimo_jax.infer.answers.familiarity import Likeness
from mimo_jax.infer.answers.outputs import check_outputs, write_all, write_json
from mimo_jax.infer.answers.write_masks import file_shape, on_grid, write_nifti, write_seg
from mimo_jax.infer.engine.requests import Request
from mimo_jax.infer.predictor import Mimo

_MAX_TILES = 25  # maximum number of slices on a contact sheet


@dataclass
class VolumeEntity:
    """A structure: the union of all masks with one entity name.

    id: index among the structures, from 0; its value in a label map is id + 1. entity: the canonical name; phrase: the words of
    the first slice that names it. voxels: number of segmented voxels; volume_mm3: None if the voxel size is unknown. slices: the
    first and last segmented slice, None if there is none. score: mean over the slices that name it, weighted by mask area.
    uncertain: the score is below the calibration's threshold (0.5 without one), or nothing is segmented.
    """

    id: int
    phrase: str
    entity: str
    voxels: int
    volume_mm3: float | None
    slices: tuple[int, int] | None
    score: float
    uncertain: bool
    shape: tuple[int, int, int] = field(repr=False)  # F, H, W
    bits: dict[int, np.ndarray] = field(repr=False)  # segmented slice -> uint8 [H, ceil(W / 8)], one bit per voxel

    @property
    def mask(self) -> np.ndarray:
        """bool [F, H, W], a new array."""
        mask = np.zeros(self.shape, bool)
        for k in self.bits:
            mask[k] = self.on_slice(k)
        return mask

    def on_slice(self, k: int) -> np.ndarray:
        """The mask of slice k, bool [H, W]."""
        bits = self.bits.get(k)
        return np.zeros(self.shape[1:], bool) if bits is None else np.unpackbits(bits, axis=-1, count=self.shape[2]).view(bool)

    def to_json(self) -> dict:
        """The fields as a plain dict; the mask as one COCO RLE per segmented slice, by its index."""
        rle = {}
        for k in sorted(self.bits):
            encoded: Any = coco.encode(np.asfortranarray(self.on_slice(k).view(np.uint8)))
            rle[str(k)] = {"size": [int(s) for s in encoded["size"]], "counts": encoded["counts"].decode("ascii")}
        return {
            "id": self.id,
            "phrase": self.phrase,
            "entity": self.entity,
            "rle": rle,
            "voxels": self.voxels,
            **({} if self.volume_mm3 is None else {"volume_mm3": round(self.volume_mm3, 2)}),
            "slices": None if self.slices is None else list(self.slices),
            "score": round(self.score, 4),
            "uncertain": self.uncertain,
        }


@dataclass
class VolumeAnswer:
    """The merged answers for all slices of a volume.

    texts: the answer for each slice. structures: in the order in which the slices name them. truncated: slices whose answer reached the
    token limit. calibrated: whether scores are expected IoUs of a slice's mask. max_segs: as in `Answer`; likeness: that of each
    slice, empty if nothing was fitted. Masks and RLEs are in pixels of each slice as shown."""

    question: str
    texts: list[str]
    structures: list[VolumeEntity]
    truncated: list[int]
    volume: Volume = field(repr=False)
    calibrated: bool = False
    max_segs: int | None = None
    likeness: list[Likeness] = field(default_factory=list)

    @property
    def understood(self) -> bool | None:
        """Whether every slice and the question are like the training data; None if the checkpoint has nothing to compare them with."""
        return all(likeness.understood for likeness in self.likeness) if self.likeness else None

    @property
    def unanswered(self) -> list[str]:
        """Names of the structures that the question asks to be segmented and that the answer for no slice mentions or marks."""
        return unanswered(self.question, "\n".join(dict.fromkeys(self.texts)), [s.phrase for s in self.structures])

    def segmented_slices(self) -> list[int]:
        """Indices of the slices with any mask."""
        return sorted({k for structure in self.structures for k in structure.bits})

    def describe(self) -> str:
        """One line per structure, and one that says on how many slices nothing is segmented."""
        lines = []
        for s in self.structures:
            size = f"{s.voxels} voxels" if s.volume_mm3 is None else f"{s.voxels} voxels, {s.volume_mm3 / 1000:.2f} cm³"
            first, last = s.slices or (None, None)
            where = "no slice" if first is None else f"slice {first}" if first == last else f"slices {first} to {last}"
            lines.append(f"{s.phrase or 'unnamed'}: {size}, {where}, score {s.score:.2f}{', uncertain' * s.uncertain}")
        empty = len(self.texts) - len(self.segmented_slices())
        lines.append(f"nothing segmented on {empty} of {len(self.texts)} slices")
        return "\n".join(lines + self._own_warnings())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What may be wrong, a line each: as `Answer.warnings`, for all slices together."""
        return (*self.volume.warnings, *self._own_warnings())

    def _own_warnings(self) -> list[str]:
        unlike = sum(likeness.image_unlike for likeness in self.likeness)
        lines = [f"({unlike} of {len(self.texts)} slices are unlike the training data)"] * bool(unlike)
        lines += self.likeness[0].notes()[-1:] if self.likeness and not self.likeness[0].question else []
        lines += left_out_notes(self.question, self.unanswered, self.max_segs)
        if self.truncated:
            lines.append(f"cut off at the token limit on {len(self.truncated)} of {len(self.texts)} slices")
        return lines

    def to_json(self) -> dict:
        """The fields as a plain dict."""
        spacing = self.volume.spacing_mm
        return {
            "slices": len(self.texts),
            "size": list(self.volume.size),
            **({} if spacing is None else {"spacing_mm": [round(s, 4) for s in spacing]}),
            "texts": self.texts,
            "unanswered": self.unanswered,
            "understood": self.understood,
            "truncated": self.truncated,
            "calibrated": self.calibrated,
            "warnings": list(self.warnings),
            "structures": [s.to_json() for s in self.structures],
        }

    def save(self, *paths: str | Path) -> None:
        """Write the answer to each path by its ending: .png a contact sheet of at most 25 segmented slices; .json `to_json`; .npy the
        masks bool [S, …] on the file's own axes (NIfTI) or [S, F, rows, columns] as the frames are stored (DICOM); .nii and .nii.gz a
        label map on the input's grid, in which later structures overwrite earlier ones; .dcm one DICOM SEG for all slices.

        Either all files are written or none. Raises UserError as `check_outputs` does, and for a .dcm if all masks are empty."""
        grids = self.volume.grids
        check_outputs(*paths, grid=grids)
        write_all(
            paths,
            {
                ".png": lambda _, file: self._sheet().save(file, "PNG"),
                ".json": lambda _, file: write_json(file, self.to_json()),
                ".npy": lambda _, file: self._write_masks(file),
                ".nii": lambda _, file: write_nifti(file, False, self._masks(), grids),
                ".nii.gz": lambda _, file: write_nifti(file, True, self._masks(), grids),
                ".dcm": lambda path, file: write_seg(path, file, [(s.phrase, s.mask) for s in self.structures], grids, False),
            },
        )

    def _masks(self) -> Iterator[np.ndarray]:
        return (structure.mask for structure in self.structures)

    def _write_masks(self, file: BinaryIO) -> None:
        """Like `np.save`, but with only one mask in memory at a time."""
        shape = file_shape(self.volume.grids)
        header = {"descr": "|b1", "fortran_order": False, "shape": (len(self.structures), *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for mask in self._masks():
            array = np.zeros(shape, bool)
            for plane, slice_mask in zip(on_grid(array, self.volume.grids), mask, strict=True):
                plane[:] = slice_mask
            file.write(array.data)

    def _sheet(self) -> Any:
        indices = self.segmented_slices()
        chosen = [indices[n] for n in np.unique(np.linspace(0, len(indices) - 1, min(_MAX_TILES, len(indices))).round().astype(int))]
        tiles = [(f"slice {k}", self.volume[k].pixels, [s.on_slice(k) for s in self.structures]) for k in chosen]
        names = [s.phrase or f"structure {s.id + 1}" for s in self.structures]
        return draw_sheet(tiles, names, f"{self.question}\n{self.describe()}".replace("cm³", "ml"))  # the font has no ³


def ask_volume(mimo: Mimo, volume: Volume, question: str, *, max_new_tokens: int | None = None, progress: bool = True) -> VolumeAnswer:
    """Ask the question about every slice, in batches of `config.generate.batch_size`; only one batch of slices is in memory at a time.
    progress: show a progress bar if stderr is a terminal. Raises UserError, before anything runs, for an invalid question."""
    mimo.check(Request(volume[0], question, max_new_tokens=max_new_tokens))
    merged = _VolumeMerger(volume, mimo.calibration)
    size = mimo.config.generate.batch_size
    # The batches have similar lengths: a single slice would need another compilation.
    batches = np.array_split(np.arange(len(volume)), -(-len(volume) // size))
    with tqdm(total=len(volume), desc="ask", unit="slice", disable=None if progress else True) as bar:
        for batch in batches:
            requests = [Request(volume[k], question, max_new_tokens=max_new_tokens) for k in batch]
            for k, answer in zip(batch.tolist(), mimo.predict(requests), strict=True):
                merged.add(k, answer)
            bar.update(len(batch))
    return VolumeAnswer(
        question, merged.texts, merged.structures(), merged.truncated, volume, bool(mimo.calibration), merged.max_segs, merged.likeness
    )


class _VolumeMerger:
    """Merges the answers for the slices as they arrive."""

    def __init__(self, volume: Volume, calibration: Calibration):
        self.volume, self.calibration = volume, calibration
        self.texts: list[str] = []
        self.truncated: list[int] = []
        self.max_segs: int | None = None
        self.likeness: list[Likeness] = []  # of the slices, if anything was fitted
        # By canonical name:
        self.phrases: dict[str, str] = {}
        self.bits: dict[str, dict[int, np.ndarray]] = {}
        self.scores: dict[str, list[tuple[float, int]]] = {}  # (score, mask area in pixels) of each entity

    def add(self, k: int, answer: Answer) -> None:
        self.texts.append(answer.text)
        self.truncated += [k] * answer.truncated
        self.max_segs = answer.max_segs
        self.likeness += [answer.likeness] if answer.likeness else []
        for e in answer.entities:
            self.phrases.setdefault(e.entity, e.phrase)
            self.scores.setdefault(e.entity, []).append((e.score, e.area_px))
            bits = self.bits.setdefault(e.entity, {})
            if e.area_px:
                bits[k] = np.packbits(e.mask, axis=-1) | bits.get(k, 0)

    def structures(self) -> list[VolumeEntity]:
        return [self._structure(n, name) for n, name in enumerate(self.phrases)]

    def _structure(self, n: int, name: str) -> VolumeEntity:
        bits, voxel_mm3 = self.bits[name], self.volume.voxel_mm3
        voxels = sum(int(np.bitwise_count(plane).sum()) for plane in bits.values())
        scores, areas = np.array(self.scores[name]).T
        score = float(np.average(scores, weights=areas if areas.any() else None))
        return VolumeEntity(
            id=n,
            phrase=self.phrases[name],
            entity=name,
            voxels=voxels,
            volume_mm3=None if voxel_mm3 is None else voxels * voxel_mm3,
            slices=(min(bits), max(bits)) if bits else None,
            score=score,
            uncertain=not bits or score < self.calibration.uncertain_below,
            shape=(len(self.volume), *self.volume.size),
            bits=bits,
        )
