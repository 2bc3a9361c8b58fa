"""Files as clinics write them: DICOM and NIfTI to one picture, with what is needed to lay a mask back onto the input.

Axis letters: H, W height and width of the picture in pixels; i, j, k axes of a NIfTI file. World axes are in mm, RAS:
x grows to the patient's right, y to the front, z to the head (DICOM's own LPS is turned into that).

A DICOM frame is shown as it is stored. A NIfTI slice is shown as a radiologist sees it, whatever the file's orientation:
the patient's left on the right side of the picture, anterior up (axial) or left (sagittal), head up (coronal, sagittal).
No message repeats what a header says of a patient.
"""

from __future__ import annotations

import gzip
import importlib
import os
import re
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mimo_jax.data.transforms import MAX_PIXELS, decode_image, windowed
from mimo_jax.errors import UserError

Window = str | tuple[float, float] | None
# Presets of --window as (low, high) in Hounsfield units.
WINDOWS = {
    "lung": (-1350.0, 150.0), "bone": (-450.0, 1050.0), "soft": (-160.0, 240.0),
    "brain": (0.0, 80.0), "abdomen": (-140.0, 260.0), "mediastinum": (-125.0, 225.0),
}  # fmt: skip
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # the world axis that a slice of each is cut across
_AXES = "ijk"
_PERCENTILES = (0.5, 99.5)
_MM = {"meter": 1000.0, "micron": 0.001}  # a NIfTI file's unit of length; others are taken for mm
# What decides how a frame looks and where it lies; an enhanced DICOM has it in these functional groups, frame by frame.
_GROUPS = ("PixelMeasures", "PlanePosition", "PlaneOrientation", "PixelValueTransformation", "FrameVOILUT")
_ATTRIBUTES = (
    "Modality", "PhotometricInterpretation", "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence", "VOILUTFunction",
    "WindowCenter", "WindowWidth", "PixelSpacing", "ImagerPixelSpacing", "SliceThickness", "SpacingBetweenSlices",
    "ImageOrientationPatient", "ImagePositionPatient",
)  # fmt: skip
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


@dataclass(frozen=True)
class NiftiGrid:
    """Where a picture lies in a NIfTI file. shape: the file's own; header: nibabel's; affine [4, 4]: voxel (i, j, k) to world
    in the file's unit. The picture is the plane `index` of the file axis `axis`, transposed, then its rows and columns turned."""

    shape: tuple[int, ...]
    header: Any = field(repr=False)
    affine: np.ndarray
    axis: int
    index: int
    transpose: bool
    flip_rows: bool
    flip_columns: bool

    def shown(self, volume: np.ndarray) -> np.ndarray:
        """The picture's plane [H, W] of an array of the file's shape: a view, so that what is written to it lands there."""
        planes = np.moveaxis(volume.reshape((*self.shape, 1)[:3]), self.axis, 0)
        return self.turned(planes[self.index])

    def turned(self, plane: np.ndarray) -> np.ndarray:
        """The picture of a plane of the file, as it is indexed there."""
        plane = plane.T if self.transpose else plane
        return plane[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


@dataclass(frozen=True)
class DicomGrid:
    """Where a picture lies in a DICOM file. dataset: pydicom's, without its pixels; frame of `frames`, from 0. affine [4, 4]:
    (column, row, 0) of the frame to world in mm, None where the file does not say where in the patient the frame lies."""

    dataset: Any = field(repr=False)
    frame: int
    frames: int
    affine: np.ndarray | None


@dataclass(frozen=True)
class Picture:
    """pixels: uint8 RGB [H, W, 3]. spacing_mm: distance of neighbouring rows and of neighbouring columns, None if unknown.
    grid: where the picture lies in a medical file, None for any other."""

    pixels: np.ndarray
    spacing_mm: tuple[float, float] | None = None
    grid: NiftiGrid | DicomGrid | None = None


def open_picture(path: str | os.PathLike, *, frame: int | None = None, slice: str | None = None, window: Window = None) -> Picture:
    """One picture out of a file; DICOM and NIfTI are known by their content, all else is read by `decode_image`.

    frame: of a DICOM of several, from 0. slice: of a NIfTI volume, "AXIS:INDEX" with i, j or k (axes of the file) or axial,
    coronal or sagittal (the file axis nearest to it); INDEX counts along that file axis, from 0. window: (low, high), the
    values that become black and white, in the file's units (CT: HU), or a name of WINDOWS; without it the file's own first
    window or VOI LUT, else the 0.5 and 99.5 percentiles. Warns where a DICOM does not rule out burned-in text.
    Raises UserError, one line, for what cannot be read or is not said.
    """
    if isinstance(window, str):
        if window.lower() not in WINDOWS:
            raise UserError(f"window {window}: is unknown; give LOW,HIGH or one of {', '.join(WINDOWS)}")
    elif window is not None and not (len(window) == 2 and np.isfinite(window).all() and window[0] < window[1]):
        raise UserError(f"window {','.join(f'{v:g}' for v in window)}: give two numbers LOW,HIGH with LOW < HIGH")
    path = Path(path)
    kind = _kind(path)
    if slice is not None and kind != "NIfTI":
        raise UserError(f"{path}: is no NIfTI volume; leave slice {slice} away" + " and give a frame" * (kind == "DICOM"))
    if frame is not None and kind != "DICOM":
        raise UserError(f"{path}: is no DICOM file; leave frame {frame} away" + " and give a slice" * (kind == "NIfTI"))
    if kind == "DICOM":
        return _open_dicom(path, frame, window)
    if kind == "NIfTI":
        return _open_nifti(path, slice, WINDOWS[window.lower()] if isinstance(window, str) else window)
    if isinstance(window, str):
        raise UserError(f"{path}: window {window} is one of Hounsfield units, which only DICOM and NIfTI hold; give LOW,HIGH")
    return Picture(decode_image(path, window=window))


def _kind(path: Path) -> str:
    """ "DICOM", "NIfTI" or "picture", by the first bytes."""
    try:
        with _opened(path) as file:
            head = file.read(352)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'a damaged or truncated gzip file'}") from None
    if head[128:132] == b"DICM":
        return "DICOM"
    if b"ni1\0" == head[344:348] or b"ni2\0" == head[4:8]:
        raise UserError(f"{path}: the header of a .hdr/.img pair; save it as one .nii.gz")
    if b"n+1\0" == head[344:348] or b"n+2\0" == head[4:8]:
        return "NIfTI"
    # Without preamble and magic a DICOM file begins with an element of group 2 or 8; no picture format does.
    return "DICOM" if head[:2] in (b"\x02\0", b"\x08\0") else "picture"


def _opened(path: Path) -> BinaryIO:
    """A file, unpacked where it is gzip."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else open(path, "rb")


def library(name: str) -> Any:
    """A module of the extra `medical`; UserError with the remedy where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f'{name} is not installed, which medical files need: pip install "mimo_jax[medical]"') from None


def _open_dicom(path: Path, frame: int | None, window: Window) -> Picture:
    pydicom, pixels = library("pydicom"), library("pydicom.pixels")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's quote the values of a header
        try:
            dataset = pydicom.dcmread(path, force=True)
            if not any(name in dataset for name in _PIXELS):
                raise UserError(f"{path}: a DICOM file without a picture (a report, say), or cut off before it")
            picture, burned_in = _frame(pixels, path, dataset, frame, window), dataset.get("BurnedInAnnotation")
        except UserError:
            raise
        except Exception as error:  # of many kinds, and their text may quote the header
            raise UserError(f"{path}: a damaged or truncated DICOM file ({type(error).__name__})") from None
    if burned_in != "NO":
        warnings.warn(f"{path}: may contain burned-in text, such as a patient's name", stacklevel=3)
    return picture


def _frame(pixels: Any, path: Path, dataset: Any, frame: int | None, window: Window) -> Picture:
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frame is None and frames > 1:
        raise UserError(f"{path}: holds {frames} frames; choose one, frame 0 to {frames - 1}")
    frame = frame or 0
    if not 0 <= frame < frames:
        raise UserError(f"{path}: frame {frame} is not there; it holds {frames}, counted from 0")
    if dataset.Rows * dataset.Columns > MAX_PIXELS:
        raise UserError(f"{path}: {dataset.Columns}x{dataset.Rows} pixels; the limit is {MAX_PIXELS} in all")
    _check_compression(pixels, path, dataset)
    values = pixels.pixel_array(dataset, index=frame)
    for name in filter(dataset.__contains__, _PIXELS):
        delattr(dataset, name)
    view = _at_frame(dataset, frame)
    if dataset.PhotometricInterpretation in ("MONOCHROME1", "MONOCHROME2"):
        rgb = np.repeat(_grey(path, view, values, window)[:, :, None], 3, axis=2)
    elif window is not None:
        raise UserError(f"{path}: a colour image takes no window; leave the window away")
    else:
        rgb = _colour(pixels, dataset, values)
    spacing = _spacing(view)
    return Picture(rgb, spacing, DicomGrid(dataset, frame, frames, _affine(view, spacing)))


def _check_compression(pixels: Any, path: Path, dataset: Any) -> None:
    """Complete a file without a meta header; UserError where no decoder is at hand."""
    if "TransferSyntaxUID" not in dataset.file_meta:  # implicit or explicit VR, little endian
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2" if dataset.original_encoding[0] else "1.2.840.10008.1.2.1"
    try:
        usable = pixels.get_decoder(dataset.file_meta.TransferSyntaxUID).is_available
    except NotImplementedError:
        usable = False
    if not usable:
        raise UserError(f'{path}: no decoder for its compression; pip install "mimo_jax[medical]", or save it uncompressed')


def _at_frame(dataset: Any, frame: int) -> dict[str, Any]:
    """The attributes that count for one frame; those of its functional groups go before those of the file."""
    found = {name: dataset[name].value for name in _ATTRIBUTES if name in dataset}
    shared, each = dataset.get("SharedFunctionalGroupsSequence"), dataset.get("PerFrameFunctionalGroupsSequence")
    groups = ([shared[0]] if shared else []) + ([each[frame]] if each else [])
    for item in (item for group in groups for name in _GROUPS for item in group.get(f"{name}Sequence") or ()):
        found.update({name: item[name].value for name in _ATTRIBUTES if name in item})
    if int(dataset.get("NumberOfFrames") or 1) > 1 and not any("PlanePositionSequence" in group for group in groups):
        found.pop("ImagePositionPatient", None)  # one place for all frames is that of the first; nothing says where the others lie
    return {name: value for name, value in found.items() if value is not None}


def _grey(path: Path, view: dict[str, Any], stored: np.ndarray, window: Window) -> np.ndarray:
    """Stored values [H, W] -> uint8 [H, W]: modality LUT or rescale, window, inversion where small values are bright."""
    if view.get("ModalityLUTSequence"):
        values = _lookup(view["ModalityLUTSequence"][0], stored)[0]
    else:
        values = stored * _number(view, "RescaleSlope", 1.0) + _number(view, "RescaleIntercept", 0.0)
    if isinstance(window, str) and view.get("Modality") not in ("CT", None, ""):
        raise UserError(f"{path}: window {window} is one of Hounsfield units, which only a CT holds; give LOW,HIGH or leave it away")
    limits = WINDOWS[window.lower()] if isinstance(window, str) else window
    center, width = _number(view, "WindowCenter"), _number(view, "WindowWidth")
    rule = str(view.get("VOILUTFunction") or "LINEAR").upper()
    if limits is None and np.isfinite(center) and width >= (1 if rule == "LINEAR" else 1e-6):
        if rule == "SIGMOID":
            values, limits = 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700))), (0.0, 1.0)
        else:
            # PS3.3 C.11.2.1.2: LINEAR counts from the first grey level to the last, LINEAR_EXACT from edge to edge.
            middle, half = (center - 0.5, (width - 1) / 2) if rule == "LINEAR" else (center, width / 2)
            limits = (middle - half, max(middle + half, middle - half + 1e-6))  # a width of 1 is a threshold
    elif limits is None and view.get("VOILUTSequence"):
        values, bits = _lookup(view["VOILUTSequence"][0], values)
        limits = (0.0, float(2**bits - 1))
    grey = windowed(values, limits, _PERCENTILES, str(path))
    return 255 - grey if view["PhotometricInterpretation"] == "MONOCHROME1" else grey


def _lookup(item: Any, values: np.ndarray) -> tuple[np.ndarray, int]:
    """(the LUT's entries for these values as float64, bits of an entry). pydicom's own wraps values beyond an 8-bit table."""
    entries, first, bits = (int(v) for v in item.LUTDescriptor)
    entries, data = entries or 2**16, item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, "<u2" if len(data) >= 2 * entries else "u1")
    table = np.atleast_1d(np.asarray(data))[:entries]
    return table[np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)].astype(np.float64), bits


def _colour(pixels: Any, dataset: Any, values: np.ndarray) -> np.ndarray:
    """Decoded values -> uint8 RGB [H, W, 3]; pydicom has already turned YBR into RGB."""
    bits = int(dataset.BitsStored)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        values = pixels.apply_color_lut(values, dataset)
        bits = int(dataset.RedPaletteColorLookupTableDescriptor[2])
    return (values[..., :3] >> max(0, bits - 8)).astype(np.uint8)


def _numbers(view: dict[str, Any], name: str) -> list[float]:
    return [float(v) for v in np.atleast_1d(view.get(name, []))]


def _number(view: dict[str, Any], name: str, default: float = np.nan) -> float:
    return next(iter(_numbers(view, name)), default)


def _spacing(view: dict[str, Any]) -> tuple[float, float] | None:
    both = (_numbers(view, name) for name in ("PixelSpacing", "ImagerPixelSpacing"))
    return next(((s[0], s[1]) for s in both if len(s) == 2 and np.isfinite(s).all() and min(s) > 0), None)


def _affine(view: dict[str, Any], spacing: tuple[float, float] | None) -> np.ndarray | None:
    """(column, row, 0) of a frame to RAS mm; PS3.3 C.7.6.2.1.1. None without orientation, position and spacing."""
    directions, position = _numbers(view, "ImageOrientationPatient"), _numbers(view, "ImagePositionPatient")
    if spacing is None or len(directions) != 6 or len(position) != 3:
        return None
    along_row, along_column = np.array(directions[:3]), np.array(directions[3:])
    normal = np.cross(along_row, along_column)
    thickness = next((v for v in _numbers(view, "SpacingBetweenSlices") + _numbers(view, "SliceThickness") if v > 0), 1.0)
    lps = np.eye(4)
    lps[:3] = np.stack([along_row * spacing[1], along_column * spacing[0], normal * thickness, np.array(position)], axis=1)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps if np.isfinite(lps).all() and np.linalg.norm(normal) > 0.5 else None


def _open_nifti(path: Path, slice: str | None, window: tuple[float, float] | None) -> Picture:
    nibabel = library("nibabel")
    with _opened(path) as stream:
        try:
            head = stream.read(8)
            stream.seek(0)
            image = (nibabel.Nifti2Image if head[4:8] == b"n+2\0" else nibabel.Nifti1Image).from_stream(stream)
            _check_nifti(path, image)
            grid = _nifti_grid(path, nibabel, image, slice)
            where = [np.s_[:]] * 3 + [0] * len(image.shape[3:])
            where[grid.axis] = grid.index
            plane = np.asarray(image.dataobj[tuple(where[: len(image.shape)])], np.float64)  # slope and intercept are in it
            shown = grid.turned(plane.reshape(np.delete((*image.shape, 1)[:3], grid.axis)))
            steps = np.linalg.norm(grid.affine[:3, :3], axis=0) * _MM.get(image.header.get_xyzt_units()[0], 1.0)
        except UserError:
            raise
        except Exception as error:  # nibabel, gzip and numpy each have their own
            raise UserError(f"{path}: a damaged or truncated NIfTI file ({type(error).__name__})") from None
    spacing = tuple(np.delete(steps, grid.axis).tolist()[:: -1 if grid.transpose else 1])
    return Picture(np.repeat(windowed(shown, window, _PERCENTILES, str(path))[:, :, None], 3, axis=2), spacing, grid)


def _check_nifti(path: Path, image: Any) -> None:
    kind, affine = image.get_data_dtype().kind, image.affine
    if kind not in "iufb":
        raise UserError(f"{path}: holds {'complex numbers' if kind == 'c' else 'colours'}; save it with one real number a voxel")
    if len(image.shape) < 2 or 0 in image.shape or any(n > 1 for n in image.shape[3:]):
        raise UserError(f"{path}: is {len(image.shape)}-D {list(image.shape)}; save the one volume that you mean as a 3-D file")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) <= 1e-6 * np.prod(np.linalg.norm(affine[:3, :3], axis=0)):
        raise UserError(f"{path}: its affine maps all voxels into one plane, so nothing says which way is up; mend its header")


def _nifti_grid(path: Path, nibabel: Any, image: Any, slice: str | None) -> NiftiGrid:
    shape = (*image.shape, 1)[:3]
    nearest = nibabel.io_orientation(image.affine)  # [3, 2]: of each file axis the nearest world axis, and 1 if it runs along
    worlds = [int(world) for world in nearest[:, 0]]
    axis, index = _chosen(path, slice, shape, worlds)
    rows, columns = sorted((a for a in range(3) if a != axis), key=lambda a: -worlds[a])
    if shape[rows] * shape[columns] > MAX_PIXELS:
        raise UserError(f"{path}: a slice of {shape[columns]}x{shape[rows]} pixels; the limit is {MAX_PIXELS} in all")
    # Down a picture z, or else y, falls; to its right x, or else y, falls: an axis that runs along its world axis is turned.
    turned = [bool(nearest[a, 1] > 0) for a in (rows, columns)]
    return NiftiGrid(image.shape, image.header, image.affine, axis, index, rows > columns, *turned)


def _chosen(path: Path, slice: str | None, shape: tuple[int, ...], worlds: list[int]) -> tuple[int, int]:
    """(file axis, index) of "AXIS:INDEX"; without it, of the only slice."""
    planes = {name: worlds.index(world) for name, world in PLANES.items()}
    counts = ", ".join(f"{_AXES[a]} (near {next(n for n in planes if planes[n] == a)}) has {shape[a]}" for a in range(3))
    if slice is None:
        if 1 not in shape:
            raise UserError(f"{path}: is a volume; choose a slice, such as slice k:{shape[2] // 2}: {counts}")
        return max(a for a in range(3) if shape[a] == 1), 0
    match = re.fullmatch(r"([a-z]+):(\d+)", slice.lower())
    if not match or match[1] not in (*_AXES, *planes):
        raise UserError(f"slice {slice}: write AXIS:INDEX, AXIS one of i, j, k, {', '.join(reversed(planes))}, such as axial:30")
    axis, index = planes[match[1]] if match[1] in planes else _AXES.index(match[1]), int(match[2])
    if index >= shape[axis]:
        raise UserError(f"{path}: slice {slice} is not there, counted from 0: {counts}")
    return axis, index
