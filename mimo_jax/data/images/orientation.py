"""How a plane of a medical file is turned for display: by the axes of the patient, the same for DICOM and NIfTI.

An axial image has the patient's left on the right and the front at the top; a coronal one the left on the right and the head at the
top; a sagittal one the front on the left and the head at the top. An oblique plane is turned to the nearest of these, without
resampling. A plane of unknown orientation is displayed as it is stored.

World axes are RAS: x grows to the patient's right, y to the front, z to the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # the world axis that is normal to each plane


@dataclass(frozen=True)
class Display:
    """A plane is transposed, then its rows and columns are flipped. plane: the nearest one of PLANES, "" if the orientation is unknown."""

    plane: str = ""
    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def turn(self, stored: np.ndarray) -> np.ndarray:
        """A stored plane [H, W, …] as it is displayed; a view, so that writing to it changes the stored plane."""
        turned = stored.swapaxes(0, 1) if self.transpose else stored
        return turned[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]

    def swap(self, pair: tuple[T, T]) -> tuple[T, T]:
        """(of the rows, of the columns) of the stored plane -> the same of the displayed one."""
        return (pair[1], pair[0]) if self.transpose else pair


def display_of(axes: np.ndarray, first: int, second: int) -> Display:
    """The display of a plane [H, W] whose rows follow each other along the file axis `first`, and its columns along `second`.
    axes: [3, 2], nibabel's orientation of the file axes: the nearest world axis of each, and 1 if it grows along it, -1 if not."""
    worlds = [int(world) for world in axes[:, 0]]
    rows, columns = (first, second) if worlds[first] > worlds[second] else (second, first)
    (normal,) = {0, 1, 2} - {worlds[first], worlds[second]}
    name = next(name for name, world in PLANES.items() if world == normal)
    # z, or else y, decreases downwards; x, or else y, decreases to the right: an axis that grows along its world axis is flipped.
    return Display(name, rows != first, bool(axes[rows, 1] > 0), bool(axes[columns, 1] > 0))


def display_of_letters(along_row: str, along_column: str) -> Display:
    """The display of a frontal radiograph by the letters of DICOM's PatientOrientation (PS3.3 C.7.6.1.1.1): where a row and a column
    lead, L to the patient's left, R right, H head, F feet. A usual one is stored with L, F; R, F is mirrored, L, H stands on its head.
    Lateral and other radiographs are displayed as they are stored, because their sides follow no one rule."""
    ends = {"R": (0, 1), "L": (0, -1), "H": (2, 1), "F": (2, -1)}  # (world axis, direction)
    if along_row not in ends or along_column not in ends or ends[along_row][0] == ends[along_column][0]:
        return Display()
    return display_of(np.array([ends[along_row], ends[along_column]]), 1, 0)
