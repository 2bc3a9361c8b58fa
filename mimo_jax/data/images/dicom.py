"""Reads images from DICOM files: modality LUT, window, inversion, colour, and the position of every frame in the patient.

How a frame is turned for display is defined in `orientation.py`, which values are black and white in `grey_values.py`.

Axis letters: F frames, H, W height and width of a frame in pixels.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.data.images.grey_values import Limits, ValueCounts, grey_levels
from mimo_jax.data.images.image import DicomGrid, MedicalImage, Window, import_medical, nearest_axes, window_limits
from mimo_jax.data.images.orientation import Display, display_of, display_of_letters
from mimo_jax.data.transforms import MAX_PIXELS
from mimo_jax.errors import UserError

# Attributes that determine the look and position of a frame; enhanced DICOM stores them per frame in these functional groups.
_GROUPS = ("PixelMeasures", "PlanePosition", "PlaneOrientation", "PixelValueTransformation", "FrameVOILUT")
_ATTRIBUTES = (
    "Modality", "PhotometricInterpretation", "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence", "VOILUTFunction",
    "WindowCenter", "WindowWidth", "PixelSpacing", "ImagerPixelSpacing", "EstimatedRadiographicMagnificationFactor", "SliceThickness",
    "SpacingBetweenSlices", "ImageOrientationPatient", "ImagePositionPatient", "PatientOrientation",
)  # fmt: skip
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_PROJECTIONS = ("CR", "DX", "RG", "RF", "XA")  # modalities of radiographs; mammograms have conventions of their own
STEP_TOLERANCE = 0.05  # share of a step by which a slice may deviate from even spacing


class DamagedError(UserError):
    """A file that is not a DICOM image, or not a complete one."""


class DicomFile:
    """A DICOM file in memory, with its pixels as stored. header: pydicom's dataset without pixels. size: (rows, columns) as stored.
    Raises DamagedError if it is not a complete image, UserError if it is too large or no decoder is available."""

    def __init__(self, path: Path):
        pydicom, self._pixels = import_medical("pydicom"), import_medical("pydicom.pixels")
        self.path = path
        with reading(path):
            self._dataset = pydicom.dcmread(path, force=True)
            if not any(name in self._dataset for name in _PIXELS):
                raise DamagedError(f"{path}: a DICOM file without an image (such as a report), or truncated before it")
            self.frames = int(self._dataset.get("NumberOfFrames") or 1)
            self.size = int(self._dataset.Rows), int(self._dataset.Columns)
            if self.size[0] * self.size[1] > MAX_PIXELS:
                raise UserError(f"{path}: {self.size[1]}x{self.size[0]} pixels; the limit is {MAX_PIXELS} in all")
            _check_compression(self._pixels, path, self._dataset)
            self._last: tuple[int, np.ndarray] | None = None
            self.header = pydicom.Dataset()
            self.header.update({tag: element for tag, element in self._dataset.items() if tag not in map(pydicom.tag.Tag, _PIXELS)})

    def image(self, frame: int, window: Window, scan_limits: Callable[[], Limits]) -> MedicalImage:
        """One frame. scan_limits: gives the values of black and white if neither `window` nor the file does; see `grey_values.py`."""
        with reading(self.path):
            view = _at_frame(self.header, frame)
            grid = self.grid(frame)
            if self.is_grey:
                rgb = np.repeat(self._grey(frame, view, window, scan_limits)[:, :, None], 3, axis=2)
            elif window is not None:
                raise UserError(f"{self.path}: a colour image has no window; omit the window")
            else:
                rgb = _colour(self._pixels, self.header, self._stored(frame))
            spacing = _spacing(view)
            return MedicalImage(np.ascontiguousarray(grid.display.turn(rgb)), spacing and grid.display.swap(spacing), grid)

    def grid(self, frame: int) -> DicomGrid:
        with reading(self.path):
            view = _at_frame(self.header, frame)
            return DicomGrid(self.header, frame, self.frames, _affine(view, _spacing(view)), _display(view))

    @property
    def is_grey(self) -> bool:
        with reading(self.path):
            return self.header.PhotometricInterpretation in ("MONOCHROME1", "MONOCHROME2")

    def position(self, frame: int) -> tuple[np.ndarray, np.ndarray] | None:
        """See `directions_and_position`."""
        with reading(self.path):
            return directions_and_position(self.header, frame)

    def count_values(self, frame: int, counts: ValueCounts) -> None:
        """Add the rescaled values of a frame of a grey image to `counts`, without its padding."""
        with reading(self.path):
            view, stored = _at_frame(self.header, frame), self._stored(frame)
            padding = _padding(self.header, stored)
            counts.add(stored if padding is None else stored[~padding], lambda values: _rescaled(view, values))

    def _stored(self, frame: int) -> np.ndarray:
        """The stored values of a frame; those of the last one are kept, because a frame is often counted and then shown."""
        if self._last is None or self._last[0] != frame:
            self._last = frame, self._pixels.pixel_array(self._dataset, index=frame)
        return self._last[1]

    def _grey(self, frame: int, view: dict[str, Any], window: Window, scan_limits: Callable[[], Limits]) -> np.ndarray:
        """uint8 [rows, columns]: rescaled, windowed, inverted if small values are bright; padding is black."""
        if isinstance(window, str) and view.get("Modality") not in ("CT", None, ""):
            raise UserError(f"{self.path}: window {window} is in Hounsfield units, which only CT has; give LOW,HIGH or omit it")
        stored = self._stored(frame)
        values, limits = _rescaled(view, stored), window_limits(window)
        if limits is None:
            values, limits = _by_own_window(view, values) or (values, scan_limits())
        grey = grey_levels(values, limits)
        grey = 255 - grey if view["PhotometricInterpretation"] == "MONOCHROME1" else grey
        padding = _padding(self.header, stored)
        return grey if padding is None else np.where(padding, np.uint8(0), grey)

    def may_have_burned_in_text(self) -> bool:
        """True unless the file rules out burned-in text."""
        return get_value(self.header, "BurnedInAnnotation") != "NO"


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Suppress warnings and logs of pydicom and highdicom, because they quote header values."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    before = [logger.disabled for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.disabled = True
            yield
        finally:
            for logger, was in zip(loggers, before, strict=True):
                logger.disabled = was


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any failure while a file is read into a DamagedError of one line that quotes no header value."""
    try:
        with silence_libraries():
            yield
    except UserError:
        raise
    except Exception as error:  # of many types, and their text may quote the header
        raise DamagedError(f"{path}: a damaged or truncated DICOM file ({type(error).__name__})") from None


def stack_affine(grids: Sequence[DicomGrid]) -> np.ndarray | None:
    """[4, 4]: (column, row, slice) to RAS mm of frames that are stacked at even steps; None if they are not, or if their positions are
    unknown. The step may be oblique, as with a tilted CT gantry."""
    affines = np.array([grid.affine for grid in grids if grid.affine is not None])
    if len(affines) < len(grids) or len(grids) < 2:
        return grids[0].affine if len(grids) == 1 else None
    positions = affines[:, :3, 3]
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    even = positions[0] + np.arange(len(positions))[:, None] * step
    stack = affines[0].copy()
    stack[:3, 2] = step
    flat = np.abs(np.linalg.det(stack[:3, :3])) < 0.5 * np.prod(np.linalg.norm(stack[:3, :3], axis=0))
    uneven = np.linalg.norm(positions - even, axis=1).max() > STEP_TOLERANCE * np.linalg.norm(step)
    rotated = np.abs(affines[:, :3, :2] - affines[0, :3, :2]).max() > 1e-3
    return None if flat or uneven or rotated else stack


def get_value(dataset: Any, name: str) -> Any:
    """An attribute's value; None if it is missing, empty or damaged (pydicom parses values on access)."""
    try:
        return dataset.get(name)
    except Exception:
        return None


def directions_and_position(dataset: Any, frame: int = 0) -> tuple[np.ndarray, np.ndarray] | None:
    """(directions [6] of a row and a column, position [3] of the first pixel) in LPS, mm; None if the file does not give them."""
    view = _at_frame(dataset, frame)
    directions, position = (np.array(_numbers(view, name)) for name in ("ImageOrientationPatient", "ImagePositionPatient"))
    valid = len(directions) == 6 and len(position) == 3 and np.isfinite([*directions, *position]).all()
    return (directions, position) if valid else None


def _check_compression(pixels: Any, path: Path, dataset: Any) -> None:
    """Add the transfer syntax to a file without a meta header. Raises UserError if no decoder is available."""
    if "TransferSyntaxUID" not in dataset.file_meta:  # implicit or explicit VR, little endian
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2" if dataset.original_encoding[0] else "1.2.840.10008.1.2.1"
    try:
        usable = pixels.get_decoder(dataset.file_meta.TransferSyntaxUID).is_available
    except NotImplementedError:
        usable = False
    if not usable:
        raise UserError(f'{path}: no decoder for its compression; pip install "mimo_jax[medical]", or save it uncompressed')


def _at_frame(dataset: Any, frame: int) -> dict[str, Any]:
    """The attributes of one frame; those of its functional groups override those of the file."""
    found = {name: dataset[name].value for name in _ATTRIBUTES if name in dataset}
    shared, each = dataset.get("SharedFunctionalGroupsSequence"), dataset.get("PerFrameFunctionalGroupsSequence")
    groups = ([shared[0]] if shared else []) + ([each[frame]] if each else [])
    for item in (item for group in groups for name in _GROUPS for item in group.get(f"{name}Sequence") or ()):
        found.update({name: item[name].value for name in _ATTRIBUTES if name in item})
    if int(dataset.get("NumberOfFrames") or 1) > 1 and not any("PlanePositionSequence" in group for group in groups):
        found.pop("ImagePositionPatient", None)  # a single position is that of the first frame; those of the others are unknown
    return {name: value for name, value in found.items() if value is not None}


def _rescaled(view: dict[str, Any], stored: np.ndarray) -> np.ndarray:
    """Stored values -> float64: by the modality LUT, or the rescale slope and intercept."""
    if view.get("ModalityLUTSequence"):
        return _lookup(view["ModalityLUTSequence"][0], stored)[0]
    return stored * _number(view, "RescaleSlope", 1.0) + _number(view, "RescaleIntercept", 0.0)


def _by_own_window(view: dict[str, Any], values: np.ndarray) -> tuple[np.ndarray, Limits] | None:
    """(values, limits) by the first window, else the VOI LUT of the frame; None if it has neither."""
    center, width = _number(view, "WindowCenter"), _number(view, "WindowWidth")
    rule = str(view.get("VOILUTFunction") or "LINEAR").upper()
    if np.isfinite(center) and width >= (1 if rule == "LINEAR" else 1e-6):
        if rule == "SIGMOID":
            return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700))), (0.0, 1.0)
        # PS3.3 C.11.2.1.2: LINEAR spans from the first grey level to the last, LINEAR_EXACT from edge to edge.
        middle, half = (center - 0.5, (width - 1) / 2) if rule == "LINEAR" else (center, width / 2)
        return values, (middle - half, max(middle + half, middle - half + 1e-6))  # a width of 1 is a threshold
    if view.get("VOILUTSequence"):
        values, bits = _lookup(view["VOILUTSequence"][0], values)
        return values, (0.0, float(2**bits - 1))
    return None


def _padding(header: Any, stored: np.ndarray) -> np.ndarray | None:
    """Which stored values are padding, bool like `stored`; None if the file has none. PS3.3 C.7.5.1.1.2."""
    ends = [get_value(header, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    values = [int(end) for end in ends if isinstance(end, int)]
    if not isinstance(ends[0], int) or stored.dtype.kind not in "iu":
        return None
    wrap = 2 ** (8 * stored.dtype.itemsize)
    if stored.dtype.kind == "i":  # a value that was written as unsigned
        values = [value - wrap if value >= wrap // 2 else value for value in values]
    return (stored >= min(values)) & (stored <= max(values))


def _lookup(item: Any, values: np.ndarray) -> tuple[np.ndarray, int]:
    """(the LUT's entries for these values as float64, bits per entry). pydicom's function wraps values beyond an 8-bit table."""
    entries, first, bits = (int(v) for v in item.LUTDescriptor)
    entries, data = entries or 2**16, item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, "<u2" if len(data) >= 2 * entries else "u1")
    table = np.atleast_1d(np.asarray(data))[:entries]
    return table[np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)].astype(np.float64), bits


def _colour(pixels: Any, dataset: Any, values: np.ndarray) -> np.ndarray:
    """Decoded values -> uint8 RGB [H, W, 3]; pydicom has already converted YBR to RGB."""
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
    """Distance of rows and of columns in the patient, mm; None if it is unknown. That of a radiograph is measured at the detector, where
    the patient appears larger by a factor that few files give. PS3.3 10.7.1.3: an equal PixelSpacing is not corrected for it."""
    pixels, detector = (_numbers(view, name) for name in ("PixelSpacing", "ImagerPixelSpacing"))
    if not pixels or pixels == detector:
        factor = _number(view, "EstimatedRadiographicMagnificationFactor")
        pixels = [spacing / factor for spacing in detector] if factor > 0 else []
    return (pixels[0], pixels[1]) if len(pixels) == 2 and np.isfinite(pixels).all() and min(pixels) > 0 else None


def _display(view: dict[str, Any]) -> Display:
    """How a frame is turned: by its orientation in the patient, or that of a radiograph by PatientOrientation; else as it is stored."""
    directions = np.array(_numbers(view, "ImageOrientationPatient"))
    if len(directions) == 6 and np.isfinite(directions).all():
        along_row, along_column = directions[:3], directions[3:]
        normal = np.cross(along_row, along_column)
        if np.linalg.norm(normal) > 0.5:
            affine = np.eye(4)
            affine[:3, :3] = np.stack([along_row, along_column, normal], axis=1) * [[-1], [-1], [1]]
            return display_of(nearest_axes(affine), 1, 0)
    letters = [str(value)[:1] for value in np.atleast_1d(view.get("PatientOrientation", []))]
    return display_of_letters(*letters) if len(letters) == 2 and view.get("Modality") in _PROJECTIONS else Display()


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
