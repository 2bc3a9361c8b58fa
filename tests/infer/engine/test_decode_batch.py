"""How a batch is painted: with its own masks, or the user's marks, before SAM's decoder."""

import numpy as np
import pytest

from mimo_jax.data.prompts import Prompts
from mimo_jax.data.transforms import mask_from_logits
from mimo_jax.infer.engine import decode_batch
from mimo_jax.infer.predictor import Mimo, Request
from tests.data.handmade import tokenizer
from tests.tiny_config import painting_params, tiny_config


@pytest.fixture(scope="module")
def mimo(tmp_path_factory):
    config = tiny_config()
    config.generate.max_new_tokens, config.generate.batch_size = 2, 2
    return Mimo(config, painting_params(config), tokenizer(tmp_path_factory.mktemp("tokenizer")))


def painted(mimo, refine=False, sam_prompts=False):
    """Evidence of every mask of two questions about one image, the first with marks."""
    mimo.config.generate.refine, mimo.config.generate.sam_prompts = refine, sam_prompts
    (image,) = mimo.encode([np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)])
    marks = Prompts(points=np.array([[9.0, 30.0, 1]]), boxes=np.array([[3.0, 4, 20, 30]]))
    answers = mimo.predict([Request(image, "What is this?", marks), Request(image, "Segment the liver.")])
    return np.array([[(e.evidence.iou, e.evidence.pixel_iou, e.area_px) for e in answer.entities] for answer in answers])


def test_refining_and_marks_change_what_is_painted_and_marks_only_where_they_are(mimo):
    plain, refined, marked, both = (painted(mimo, *options) for options in ((), (True,), (False, True), (True, True)))
    assert plain.shape == (2, 2, 3)
    assert np.abs(refined - plain).max(axis=(1, 2)).min() > 1e-3, "each answer"
    assert np.abs(marked[0] - plain[0]).max() > 1e-3
    np.testing.assert_allclose(marked[1], plain[1], atol=1e-4)
    np.testing.assert_allclose(both[1], refined[1], atol=1e-4)
    assert np.abs(both[0] - refined[0]).max() > 1e-3


def test_a_small_mask_is_decoded_again_on_the_crop_around_it(mimo, monkeypatch):
    """Whatever the crop: the same `<SEG>` state on the features of the crop alone, pasted where it was cut out."""
    mimo.config.generate.refine = mimo.config.generate.sam_prompts = False
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    crop = (slice(8, 30), slice(20, 50))
    batch = mimo.start(Request(pixels, "Segment the liver."))
    batch.decode()
    (inner,) = mimo.encode([pixels[crop]])
    position = batch.generated_ids[0].index(mimo.tokenizer.seg)
    logits, _ = mimo.engine.segment(inner.features[None], batch.state.states, np.array([[position]], np.int32), 1)
    expected = mask_from_logits(np.asarray(logits[0, 0]), inner.sam_frame, 22, 30)
    assert 0 < expected.sum() < expected.size

    monkeypatch.setattr(decode_batch, "crop_around", lambda logits, frame: crop)
    monkeypatch.setattr(mimo.config.generate, "zoom", True)
    ((answer, _),) = mimo.finish(batch)
    np.testing.assert_array_equal(answer.entities[0].mask[crop], expected)
    assert answer.entities[0].area_px == expected.sum()
