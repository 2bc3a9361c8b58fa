"""Files as clinics write them: DICOM, NIfTI or any picture to one Picture, with what is needed to lay a mask back onto the input.

A DICOM frame is shown as it is stored. A NIfTI slice is shown as a radiologist sees it, whatever the file's orientation:
the patient's left on the right side of the picture, anterior up (axial) or left (sagittal), head up (coronal, sagittal).
No message repeats what a header says of a patient.
"""

from __future__ import annotations

import os
from pathlib import Path

from mimo_jax.data.images.dicom import open_frame
from mimo_jax.data.images.image import MedicalImage, Window, check_window, file_kind
from mimo_jax.data.images.nifti import open_slice
from mimo_jax.data.transforms import decode_image
from mimo_jax.errors import UserError


def open_image(path: str | os.PathLike, *, frame: int | None = None, slice: str | None = None, window: Window = None) -> MedicalImage:
    """One picture out of a file; DICOM and NIfTI are known by their content, all else is read by `decode_image`.

    frame: of a DICOM of several, from 0. slice: of a NIfTI volume, "AXIS:INDEX" with i, j or k (axes of the file) or axial,
    coronal or sagittal (the file axis nearest to it); INDEX counts along that file axis, from 0. window: (low, high), the
    values that become black and white, in the file's units (CT: HU), or a name of WINDOWS; without it the file's own first
    window or VOI LUT, else the 0.5 and 99.5 percentiles. Warns where a DICOM does not rule out burned-in text.
    Raises UserError, one line, for what cannot be read or is not said.
    """
    check_window(window)
    path = Path(path)
    kind = file_kind(path)
    if slice is not None and kind != "NIfTI":
        raise UserError(f"{path}: is no NIfTI volume; leave slice {slice} away" + " and give a frame" * (kind == "DICOM"))
    if frame is not None and kind != "DICOM":
        raise UserError(f"{path}: is no DICOM file; leave frame {frame} away" + " and give a slice" * (kind == "NIfTI"))
    if kind == "DICOM":
        return open_frame(path, frame, window)
    if kind == "NIfTI":
        return open_slice(path, slice, window)
    if isinstance(window, str):
        raise UserError(f"{path}: window {window} is one of Hounsfield units, which only DICOM and NIfTI hold; give LOW,HIGH")
    return MedicalImage(decode_image(path, window=window))
