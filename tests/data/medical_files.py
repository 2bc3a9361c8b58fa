"""Small DICOM and NIfTI files made by hand, for tests."""

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid


def dicom(pixels, *, photometric="MONOCHROME2", frames=None, without=(), **attributes):
    """A CT of pixels uint8, uint16 or int16 [H, W], [F, H, W] with `frames`, or [H, W, 3]. PixelSpacing 0.5 (rows) x 0.25."""
    ds = pydicom.Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        setattr(ds, name, generate_uid())
    ds.SpecificCharacterSet, ds.PatientName, ds.PatientID = "ISO_IR 100", "Müller^Jörg", "SECRET-7"
    for name in ("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
        setattr(ds, name, "")
    ds.Modality, ds.SeriesNumber, ds.InstanceNumber, ds.BurnedInAnnotation = "CT", 3, 1, "NO"
    ds.PixelSpacing, ds.SliceThickness = [0.5, 0.25], 2
    ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [10, 20, 30]
    colour = pixels.ndim - (frames is not None) == 3
    ds.Rows, ds.Columns = pixels.shape[frames is not None :][:2]
    if frames is not None:
        ds.NumberOfFrames = frames
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 3 if colour else 1, photometric
    if colour:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = ds.BitsStored = 8 * pixels.itemsize
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == "i")
    for name, value in attributes.items():
        setattr(ds, name, value)
    for name in without:
        delattr(ds, name)
    ds.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    ds["PixelData"].VR = "OW" if ds.BitsAllocated > 8 else "OB"
    return ds


def enhanced(pixels, centers=None, **attributes):
    """A multi-frame MR of pixels uint16 [F, H, W] with functional groups: frame n lies 3 n mm up, its window is centers[n], 10."""
    ds = dicom(pixels, frames=len(pixels), without=("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"), **attributes)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = EnhancedMRImageStorage
    ds.Modality = "MR"

    def group(**values):
        item = pydicom.Dataset()
        for name, value in values.items():
            setattr(item, name, value)
        return [item]

    shared = group(
        PixelMeasuresSequence=group(PixelSpacing=[2, 4], SliceThickness=3, SpacingBetweenSlices=3),
        PlaneOrientationSequence=group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
    )
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = shared, []
    for n in range(len(pixels)):
        (item,) = group(
            PlanePositionSequence=group(ImagePositionPatient=[0, 0, 3 * n]),
            PixelValueTransformationSequence=group(RescaleSlope=1, RescaleIntercept=0, RescaleType="US"),
        )
        if centers:
            item.FrameVOILUTSequence = group(WindowCenter=centers[n], WindowWidth=10, VOILUTFunction="LINEAR_EXACT")
        ds.PerFrameFunctionalGroupsSequence.append(item)
    return ds


def saved(ds, path):
    ds.save_as(path, enforce_file_format=True)
    return path


def series(folder, slices, *, directions=(1, 0, 0, 0, 1, 0), origin=(10, 20, 30), step=2.0, at=None, seed=0, **attributes):
    """A series of slices uint16 [F, H, W] as CT files in a folder, their names and instance numbers in random order. Slice k lies
    at[k] (default k) steps of mm up the normal of `directions` (LPS). Returns the paths, in the order of the slices."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    names, numbers = rng.permutation(len(slices)), rng.permutation(len(slices)) + 1
    normal = np.cross(directions[:3], directions[3:])
    shared = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    paths = []
    for k, (pixels, height) in enumerate(zip(slices, at or range(len(slices)), strict=True)):
        place = [round(float(v), 6) for v in np.array(origin) + normal * step * height]
        ds = dicom(pixels, **(shared | {"InstanceNumber": int(numbers[k])} | attributes))
        if "ImagePositionPatient" in ds:
            ds.ImageOrientationPatient, ds.ImagePositionPatient = list(directions), place
        paths.append(saved(ds, folder / f"{names[k]:03}"))
    return paths


def lut(first, table, bits):
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(table), first, bits]
    item["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    item.add_new("LUTData", "US", [int(v) for v in table])
    return [item]


def nifti(path, volume, affine, kind=nibabel.Nifti1Image, **header):
    image = kind(volume, affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def affine_of(rng, oblique):
    """A random voxel-to-world map: axes permuted and flipped, steps of 0.5 to 4 mm, turned by up to `oblique` radians about
    each axis."""
    turn = np.eye(3)
    for axis in range(3):
        angle = rng.uniform(-oblique, oblique)
        a, b = [n for n in range(3) if n != axis]
        step = np.eye(3)
        step[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        turn = step @ turn
    signed = np.eye(3)[:, rng.permutation(3)] * rng.choice([-1.0, 1.0], 3)
    affine = np.eye(4)
    affine[:3, :3] = turn @ signed * rng.uniform(0.5, 4, 3)
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    return affine
