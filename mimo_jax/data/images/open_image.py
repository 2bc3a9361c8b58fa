"""Opens a DICOM, NIfTI or other image file as one MedicalImage, with the position that is needed to write a mask back to the file.

A DICOM frame and a NIfTI slice are displayed as a radiologist sees them, however they are stored (`orientation.py`): the patient's left
on the right side of the image, anterior up (axial) or left (sagittal), head up (coronal, sagittal). A DICOM frame that does not say its
orientation in the patient, such as of ultrasound, is displayed as it is stored. Grey values are defined in `grey_values.py`.
No message contains header values about a patient.
"""

from __future__ import annotations

import os

from mimo_jax.data.images.image import MedicalImage, Window, check_window, file_kind, local_path, warn_of
from mimo_jax.data.images.nifti import open_slice
from mimo_jax.data.images.series import open_frame
from mimo_jax.data.transforms import decode_picture
from mimo_jax.errors import UserError


def open_image(path: str | os.PathLike, *, frame: int | None = None, slice: str | None = None, window: Window = None) -> MedicalImage:
    """One image from a file. DICOM and NIfTI are recognised by their content; all other files are read by `decode_picture`.

    frame: index in a multi-frame DICOM file, from 0. slice: of a NIfTI volume, "AXIS:INDEX" with AXIS i, j or k (file axes) or axial,
    coronal or sagittal (the nearest file axis); INDEX counts along that file axis, from 0. window: (low, high), the values shown as
    black and white, in the file's units (CT: HU), or a name of WINDOWS; the default is the file's first window or VOI LUT, else the
    0.5 and 99.5 percentiles of the whole scan, also of the other slices. Warns if a DICOM slice needs them and its scan is not in the
    same folder, and if a DICOM file may contain burned-in text; of any other image, if its values are stretched or pixels are
    transparent. The lines are also `MedicalImage.warnings`.
    Raises UserError, one line, for a file that cannot be read or a missing or wrong choice.
    """
    check_window(window)
    path = local_path(path)
    kind = file_kind(path)
    if slice is not None and kind != "NIfTI":
        raise UserError(f"{path}: is not a NIfTI volume; omit slice {slice}" + " and give a frame" * (kind == "DICOM"))
    if frame is not None and kind != "DICOM":
        raise UserError(f"{path}: is not a DICOM file; omit frame {frame}" + " and give a slice" * (kind == "NIfTI"))
    if kind == "DICOM":
        image = open_frame(path, frame, window)
        warn_of(image)
        return image
    if kind == "NIfTI":
        return open_slice(path, slice, window)
    if isinstance(window, str):
        raise UserError(f"{path}: window {window} is in Hounsfield units, which only DICOM and NIfTI files have; give LOW,HIGH")
    pixels, choices = decode_picture(path, window=window)
    image = MedicalImage(pixels, warnings=tuple(choices))
    warn_of(image)
    return image
