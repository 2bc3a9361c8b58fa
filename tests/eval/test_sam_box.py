"""SAM with box prompts: the boxes reach the decoder as SAM's own prompt encoder takes them, and the masks are scored."""

import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.data.transforms import mask_from_logits
from mimo_jax.eval import sam_box
from mimo_jax.eval.report import make_report
from mimo_jax.eval.selection import select_samples
from mimo_jax.infer.predictor import Mimo
from mimo_jax.models import mimo as mimo_model
from mimo_jax.models import scan
from tests.data import handmade
from tests.eval.test_evaluate import record
from tests.tiny_config import random_params, tiny_config


@pytest.fixture(scope="module")
def mimo(tmp_path_factory):
    config = tiny_config(max_turns=2)
    return Mimo(config, random_params(config), handmade.tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_masks_are_those_of_sams_box_prompts(mimo):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    (image,) = mimo.encode([pixels])
    boxes = np.array([[5, 6, 30, 36], [10, 0, 60, 40], [0, 0, 7, 9]])
    found = sam_box.BoxPromptedSam(mimo).masks(image, boxes)
    model = scan.bind(mimo_model.abstract(mimo.config)[0], mimo.engine.params)
    scale = np.array([64 / 60, 43 / 40] * 2)  # from the edges of pixels to SAM's continuous frame, of which the image takes 64 x 43
    sparse, dense = model.sam_prompt(boxes=jnp.asarray(boxes * scale, jnp.float32)[None])
    logits, iou = model.sam_decoder(image.features[None], model.sam_prompt.dense_pe(), sparse, dense)
    for k, (mask, predicted) in enumerate(found):
        assert predicted == pytest.approx(float(iou[0, k, 0]), abs=1e-5)
        assert np.mean(mask != mask_from_logits(np.asarray(logits[0, k, 0]), image.sam_frame, 40, 60)) < 1e-3


def test_prompted_questions_alone_are_scored(mimo, monkeypatch):
    records = [record(i) for i in range(2)]
    chosen = select_samples(records, None, ["II", "IV"])
    report = make_report(sam_box.collect_box_results(mimo, records, chosen))
    assert report["n"]["entities"] == {"I": 0, "II": 4, "III": 0, "IV": 2} and report["miou"]["I"] is None
    assert 0 <= report["miou"]["II"] <= 1 and set(report["ap50_by_modality"]) == {"CT with prompt"}

    def filled(self, image, boxes):
        masks = np.zeros((len(boxes), *image.pixels.shape[:2]), bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
            mask[y0:y1, x0:x1] = True
        return [(mask, 0.5) for mask in masks]

    monkeypatch.setattr(sam_box.BoxPromptedSam, "masks", filled)
    report = make_report(sam_box.collect_box_results(mimo, records, chosen))
    wanted = [m.area_px / np.prod(np.subtract(m.box_xyxy[2:], m.box_xyxy[:2])) for r in records for m in r.masks]
    assert min(wanted) - 1e-3 <= report["miou"]["II"] <= max(wanted) + 1e-3
