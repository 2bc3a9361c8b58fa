import numpy as np
import pytest

from mimo_jax.data.prompts import Prompts
from mimo_jax.infer.answers.answer import Answer
from mimo_jax.infer.answers.calibration import CalibrationError
from mimo_jax.infer.answers.familiarity import MIN_IMAGES, Familiarity, Likeness, pooled

TRAIN = ["Is there a brain tumor in this image?", "Segment the left kidney.", "segment the liver", "Outline the lung.", "What is this?"]


def images(count, seed, shift=0.0):
    """Features of two modalities: correlated, of very different scales, in two clusters."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(12, 12))
    centre = np.where(rng.random((count, 1)) < 0.5, -6.0, 6.0)
    return ((rng.normal(size=(count, 12)) + shift) @ mixing + centre) * 10.0 ** np.arange(-3, 9, 1)


@pytest.fixture(scope="module")
def fitted():
    return Familiarity.fit(TRAIN, TRAIN[:2] * 40, images(300, 1), images(200, 2))


def test_distances_are_those_of_a_whitening_by_the_whole_matrix(fitted):
    train, other = fitted.images.astype(np.float64), images(7, 3)
    z = (train - train.mean(0)) / train.std(0)
    correlation = 0.7 * np.cov(z.T) + 0.3 * np.eye(12)
    inverse = np.linalg.inv(correlation)
    for row, distance in zip((other - train.mean(0)) / train.std(0), fitted.distances(other), strict=True):
        expected = min(np.sqrt((row - t) @ inverse @ (row - t)) for t in z)
        assert distance == pytest.approx(expected, rel=1e-3)


def test_few_validation_images_and_most_strange_ones_exceed_the_limit(fitted):
    assert (fitted.distances(images(200, 2)) > fitted.image_limit).mean() <= 0.03
    assert (fitted.distances(images(300, 4)) > fitted.image_limit).mean() < 0.06
    assert (fitted.distances(images(300, 5, shift=5.0)) > fitted.image_limit).mean() > 0.95


@pytest.mark.parametrize(
    "question, read",
    [
        ("Is there a BRAIN TUMOUR in this image?", "Is there a brain tumor in this image?"),
        ("IS THERE A LIVER IN THIS IMAGE?", "Is there a liver in this image?"),
        ("segment the L kidney", "segment the left kidney"),
        ("Outline the lungs.", "Outline the lung."),
        ("Segment the Liver", "Segment the liver"),
        # What the training does not name is left as it is.
        ("Segment the oesophagus.", "Segment the oesophagus."),
        ("Segment the unicorn.", "Segment the unicorn."),
        ("What is this?", "What is this?"),
    ],
)
def test_a_question_is_read_in_the_words_of_the_training(fitted, question, read):
    assert fitted.readable(question) == read and fitted.readable(read) == read
    assert Familiarity().readable(question) == question


@pytest.mark.parametrize("question", ["Segment the unicorn.", "Segment everything", "请分割肝脏", "Segmentez le foie"])
def test_a_question_with_words_that_no_training_question_has_is_not_understood(fitted, question):
    likeness = fitted.likeness(fitted.readable(question), None)
    assert not likeness.understood and likeness.words and likeness.image is None
    assert all(fitted.likeness(known, None).understood for known in TRAIN)


def test_the_limit_of_words_is_that_of_varied_questions():
    varied = [f"Is there a number{'x' * n} here?" for n in range(50)]  # every validation question has a word of its own
    assert Familiarity.fit(TRAIN, varied, np.zeros((0, 3)), np.zeros((0, 3))).word_limit == 2
    few = Familiarity.fit(TRAIN, TRAIN, images(MIN_IMAGES - 1, 1), images(MIN_IMAGES, 2))
    assert len(few.images) == 0 and few.likeness("What is this?", np.ones(12)).image is None


def test_an_answer_says_what_is_unlike_the_training_data(fitted):
    def answer(likeness, read_as=""):
        image = np.zeros((4, 4, 3), np.uint8)
        return Answer("There is no macula.", [], [], False, "What?", image, Prompts(), likeness=likeness, read_as=read_as)

    strange = answer(fitted.likeness("Segment the unicorn.", images(1, 5, shift=9.0)[0]), "Segment it.")
    assert strange.understood is strange.to_json()["understood"] is False
    assert "(the question has words that no training question has: unicorn)" in strange.describe()
    assert (
        "(the image is unlike the training data: its distance is" in strange.describe() and "(read as: Segment it.)" in strange.describe()
    )
    assert strange.to_json()["likeness"]["words"] == ["unicorn"] and strange.to_json()["likeness"]["image_unlike"]
    plain = answer(Likeness(0.5, (), True))
    assert plain.understood and "unlike" not in plain.describe() and "read_as" not in plain.to_json()
    assert answer(None).understood is None and answer(None).to_json()["understood"] is None


def test_pooled_features_are_means_and_deviations_over_positions():
    x_img, scale = np.random.default_rng(0).normal(size=(5, 3)), np.random.default_rng(1).normal(size=(2, 2, 4))
    expected = np.concatenate([x_img.mean(0), x_img.std(0), scale.mean((0, 1)), scale.std((0, 1))])
    np.testing.assert_allclose(pooled(x_img, [scale]), expected, rtol=1e-5)


def test_written_and_read(fitted, tmp_path):
    path = tmp_path / "familiarity.npz"
    assert not Familiarity.read(path)
    fitted.write(path)
    read = Familiarity.read(path)
    assert (read.words, read.word_limit, read.image_limit) == (fitted.words, fitted.word_limit, fitted.image_limit)
    np.testing.assert_array_equal(read.images, fitted.images)
    for content in (b"", path.read_bytes()[:-40], b"PK" * 50):
        path.write_bytes(content)
        with pytest.raises(CalibrationError, match=r"familiarity.npz: is damaged; fit it again"):
            Familiarity.read(path)
