"""What is logged and warned of says nothing of the patient, the file or the question."""

import logging
import warnings

import numpy as np
import pytest

from mimo_jax.data.images.volume import open_volume
from mimo_jax.infer.batch.run_batch import run_batch
from mimo_jax.infer.predictor import Mimo
from mimo_jax.infer.volume import ask_volume
from tests.data.handmade import tokenizer as make_tokenizer
from tests.data.medical_files import dicom, saved, series
from tests.tiny_config import random_params, tiny_config

QUESTION = "Where is the tumour of Jörg?"


@pytest.fixture(scope="module")
def mimo(tmp_path_factory):
    config = tiny_config(max_turns=2)
    config.generate.max_new_tokens = 6
    return Mimo(config, random_params(config), make_tokenizer(tmp_path_factory.mktemp("tokenizer")), origin="base 0")


def test_logs_and_warnings_tell_shapes_and_counts_alone(mimo, tmp_path, caplog):
    folder = tmp_path / "Mueller_Joerg"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 999, (20, 30)).astype(np.uint16)
    dataset = dicom(pixels, BurnedInAnnotation="YES")
    path = saved(dataset, folder / "joerg.dcm")
    (folder / "broken.dcm").write_bytes(path.read_bytes()[:400])
    # pydicom logs that this one says implicit VR and is not.
    (folder / "odd.dcm").write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0"))
    scan = tmp_path / "scan_of_Joerg"
    files = series(scan, np.stack([pixels] * 4), BurnedInAnnotation="YES", at=[0, 1, 2, 5])
    files[1].write_bytes(files[1].read_bytes()[:500])

    caplog.set_level(logging.DEBUG)
    logging.getLogger("jax").setLevel(logging.WARNING)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        chat = mimo.open(path)
        chat.ask(QUESTION)
        list(chat.stream(QUESTION, points=[[3, 3, 1]]))
        ask_volume(mimo, open_volume(scan), QUESTION, progress=False)
        done = run_batch(lambda: mimo, folder, tmp_path / "out", QUESTION, save=[".png"])
    assert done.answered == 2 and done.failed == 1
    said = [record.getMessage() for record in caplog.records] + [str(warning.message) for warning in told]
    assert sum("tokens" in line for line in said) >= 3 and any("burned-in" in line for line in said), said
    uids = {str(dataset.get(name)) for name in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    for secret in ("oerg", "Jörg", "Müller", "SECRET-7", "tumour", str(tmp_path), *uids):
        assert not [line for line in said if secret in line], secret
