"""A small model with random weights, asked about images; where the words matter, its generated ids are replaced by chosen ones."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from mimo_jax import pathtree
from mimo_jax.checkpoints import checkpoint
from mimo_jax.data.conversation import encode_user_turn
from mimo_jax.data.images.open_image import MedicalImage, open_image
from mimo_jax.data.prompts import Prompts
from mimo_jax.errors import UserError
from mimo_jax.geometry import sam_frame, vision_frame
from mimo_jax.infer.answers import answer as answers
from mimo_jax.infer.engine.decode_batch import bucket, cache_bucket
from mimo_jax.infer.engine.requests import EncodedImage, Request, Sampling
from mimo_jax.infer.predictor import Mimo
from tests.data.handmade import lisa_tokenizer
from tests.data.handmade import tokenizer as make_tokenizer
from tests.data.medical_files import dicom, nifti, saved
from tests.tiny_config import random_params, tiny_config


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def mimo(tokenizer):
    config = tiny_config(max_turns=2)
    config.generate.max_new_tokens = 24
    return Mimo(config, random_params(config), tokenizer)


def picture(height=40, width=56, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


class Said:
    """While it holds, the model's generated ids are these; states and masks stay the model's own, and what is said goes into the
    cache. `calls`: (x_q, ids, query_index, start, lengths) that it was given."""

    def __init__(self, mimo, *rows, prob=0.5):
        self.mimo, self.rows, self.prob, self.calls = mimo, rows, prob, []

    def __enter__(self):
        engine, eos = self.mimo.engine, self.mimo.tokenizer.eos
        real_prefill, real_decode = engine.prefill, engine.decode

        def prefill(cache, x_q, ids, query_index, start, lengths, limits, *rest):
            self.calls.append((np.asarray(x_q), ids, query_index, start, lengths))
            return real_prefill(cache, x_q, ids, query_index, start, lengths, np.full_like(limits, rest[-1]), *rest)

        def decode(state, until):
            state = real_decode(state, state.ids.shape[1])
            ids, taken = np.zeros(state.ids.shape, np.int32), np.zeros(state.num_generated.shape, np.int32)
            for b, row in enumerate(self.rows):
                ids[b, : len(row)], taken[b] = row, len(row)
            closed = np.pad(ids, ((0, 0), (0, 1)))
            closed[np.arange(len(ids)), taken] = eos
            sampling, limits = (state.temperature, state.top_p, state.seed), np.zeros_like(taken)
            kept = real_prefill(
                state.cache,
                self.calls[-1][0],
                closed,
                np.full_like(closed, -1),
                np.asarray(state.prompt_len),
                taken + 1,
                limits,
                *sampling,
                1,
            )
            return state._replace(
                cache=kept.cache,
                ids=jnp.asarray(ids),
                num_generated=jnp.asarray(taken),
                probs=jnp.full(ids.shape, self.prob),
                ended=jnp.asarray(taken > 0),
                active=jnp.zeros(len(ids), bool),
            )

        engine.prefill, engine.decode = prefill, decode
        return self

    def __exit__(self, *_):
        del self.mimo.engine.prefill, self.mimo.engine.decode


def grounded(tokenizer, *phrases):
    """Ids of "The <p>phrase<SEG></p> The <p>…"."""
    ids = []
    for phrase in phrases:
        ids += [*tokenizer.encode("The"), tokenizer.p_open, *tokenizer.encode(phrase), tokenizer.seg, tokenizer.p_close]
    return ids


def same(a, b):
    assert a.text == b.text and a.parts == b.parts and a.truncated == b.truncated and len(a.entities) == len(b.entities)
    for x, y in zip(a.entities, b.entities, strict=True):
        assert x.phrase == y.phrase and x.score == pytest.approx(y.score, abs=1e-4)
        assert (x.mask != y.mask).mean() < 0.01


def test_a_batch_of_mixed_requests_equals_single_ones(mimo):
    small, wide = picture(), picture(17, 90, 1)
    prompts = Prompts(points=np.array([[5.0, 6.0, 1]]), boxes=np.array([[2.0, 3, 20, 14]]))
    requests = [
        Request(small, "Segment the liver."),
        Request(wide, "What is this?", prompts),
        Request(small, "What is this?", prompts),
        Request(small, "Which organ makes bile? " * 12),
        Request(wide, "Is there a liver?", max_new_tokens=3),
    ]
    together = mimo.predict(requests)
    assert len({a.text for a in together}) > 2
    for request, one in zip(requests, together, strict=True):
        same(one, mimo.predict([request])[0])
        assert one.image is request.image and one.question == request.question


def test_prompts_and_question_reach_the_answer(mimo):
    chat = mimo.open(picture())
    plain = mimo.predict([Request(chat.image, "What is this?")])[0]
    asked = mimo.predict([Request(chat.image, "Is there a liver?")])[0]
    pointed = mimo.predict([Request(chat.image, "What is this?", Prompts(boxes=[[1, 1, 30, 20]]))])[0]
    assert plain.text != asked.text and plain.text != pointed.text


def test_an_image_is_encoded_once(mimo):
    mimo.engine.counts.clear()
    chat = mimo.open(picture())
    chat.ask("What is this?")
    chat.ask("Segment the liver.", points=[[3, 4, 1]])
    assert mimo.engine.counts["images"] == 1
    image = picture(seed=3)
    mimo.predict([Request(image, "What is this?"), Request(image, "Is there a liver?"), Request(chat.image, "What is this?")])
    assert mimo.engine.counts["images"] == 2


def test_entities_follow_from_mask_iou_and_probability(mimo, tokenizer):
    with Said(mimo, grounded(tokenizer, "liver", "left  Lung."), prob=0.25):
        answer = mimo.open(picture()).ask("Segment both.")
    assert [(e.id, e.entity) for e in answer.entities] == [(0, "liver"), (1, "left lung")]
    assert "".join(p["text"] for p in answer.parts) == answer.text
    assert [p.get("entity_id") for p in answer.parts if "entity_id" in p] == [0, 1]
    assert not answer.truncated
    for e in answer.entities:
        assert e.mask.shape == (40, 56) and e.mask.dtype == bool and e.area_px == e.mask.sum()
        assert 0 <= e.iou <= 1 and e.score == pytest.approx(e.iou * 0.25) and e.uncertain
        if e.area_px:
            x0, y0, x1, y1 = e.box_xyxy
            assert e.mask[y0:y1, x0:x1].sum() == e.area_px
            assert e.mask[y0].any() and e.mask[y1 - 1].any() and e.mask[:, x0].any() and e.mask[:, x1 - 1].any()
    assert (answer.entities[0].mask != answer.entities[1].mask).any()
    values = json.loads(json.dumps(answer.to_json()))
    for e, row in zip(answer.entities, values["entities"], strict=True):
        assert (coco.decode(row["rle"]).astype(bool) == e.mask).all()
    assert set(values) == {"text", "parts", "entities", "unanswered", "understood", "truncated", "calibrated", "warnings"}
    assert set(values["entities"][0]) == {"id", "phrase", "entity", "rle", "box_xyxy", "area_px", "iou", "score", "uncertain"}


def test_more_segs_than_training_slots_are_all_painted(mimo, tokenizer):
    assert mimo.config.model.max_segs == 3
    with Said(mimo, [tokenizer.seg] * 7):
        answer = mimo.open(picture()).ask("Segment all.")
    assert len(answer.entities) == 7 and all(e.phrase == "" for e in answer.entities)


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["p_open", "p_close", "seg", "eos", 40, 300, 511]), max_size=12))
def test_no_order_of_tags_crashes(mimo, tokenizer, row):
    ids = [getattr(tokenizer, i) if isinstance(i, str) else i for i in row]
    with Said(mimo, ids):
        answer = mimo.open(picture()).ask("What is this?")
    assert len(answer.entities) == ids.count(tokenizer.seg)
    assert [p["entity_id"] for p in answer.parts if "entity_id" in p] == list(range(len(answer.entities)))
    assert not any(tag in answer.text for tag in ("<p>", "</p>", "<SEG>"))
    json.dumps(answer.to_json())


def test_an_answer_without_seg_says_so_and_paints_nothing(mimo, tokenizer, monkeypatch):
    monkeypatch.setattr(mimo.engine, "segment", lambda *_: pytest.fail("nothing is to be painted"))
    with Said(mimo, tokenizer.encode("Yes.")):
        answer = mimo.open(picture()).ask("Is there a liver?")
    assert answer.text == "Yes." and answer.entities == [] and answers.NO_MASKS in answer.describe()


def test_limits_cut_and_say_so(mimo):
    chat = mimo.open(picture())
    made = [mimo.generate([Request(chat.image, "What is this?", max_new_tokens=n)])[0] for n in (2, None, 30)]
    prompt = len(encode_user_turn(mimo.tokenizer, mimo.config, "What is this?", 0, True)[0])
    ids = [past.ids[prompt:-1] for _, past in made]
    assert [len(row) for row in ids] == [2, 24, 30]  # 24: the config's own limit
    assert ids[1][:2] == ids[0] and ids[2][:24] == ids[1]
    cut = made[0][0]
    assert cut.truncated and "cut off" in cut.describe()
    assert "cut off" not in dataclasses.replace(cut, truncated=False).describe()


def test_later_turns_stand_behind_earlier_ones_as_they_were(mimo, tokenizer):
    """The second turn alone is prefilled, at the place and with the X_q that it has in the whole conversation, which is what is
    prefilled where no cache was kept; only its <SEG>s count."""
    chat = mimo.open(picture())
    first_answer = grounded(tokenizer, "liver", "spleen")
    with Said(mimo, first_answer) as first:
        chat.ask("Segment both.", boxes=[[1, 1, 9, 9]])
    past = list(chat._past)
    with Said(mimo, grounded(tokenizer, "liver")) as second:
        answer = chat.ask("What is this?", points=[[30, 20, 1]])
        again = mimo.predict([Request(chat.image, "What is this?", Prompts(points=[[30, 20, 1]]), past=past)])[0]
    assert len(answer.entities) == 1 and len(chat.answers) == 2 and len(chat.answers[0].entities) == 2
    same(answer, again)

    q = mimo.config.model.query_tokens()
    ids1, index1 = encode_user_turn(tokenizer, mimo.config, "Segment both.", 0, True)
    ids2, index2 = encode_user_turn(tokenizer, mimo.config, "What is this?", 1, False)
    ids = [*ids1, *first_answer, tokenizer.eos, *ids2]
    (x_q1, input1, _, start1, length1), (x_q2, input2, query2, start2, length2) = first.calls[0], second.calls[0]
    assert input1[0, : length1[0]].tolist() == ids1 and start1[0] == 0
    assert input2[0, : length2[0]].tolist() == ids2 and start2[0] == len(ids) - len(ids2)
    assert query2[0, : length2[0]].tolist() == [max(i - q, -1) for i in index2] and x_q2.shape[1:3] == (1, q)
    x_q, whole, query, start, length = second.calls[1]
    assert whole[0, : length[0]].tolist() == ids and start[0] == 0
    assert query[0, : length[0]].tolist() == [*index1, *[-1] * (len(first_answer) + 1), *index2] and x_q.shape[1:3] == (2, q)
    np.testing.assert_array_equal(x_q[0, 0], x_q1[0, 0])
    np.testing.assert_allclose(x_q[0, 1], x_q2[0, 0], rtol=1e-5, atol=1e-6)
    assert np.abs(x_q[0, 1] - x_q[0, 0]).max() > 1e-4


@pytest.mark.parametrize("limit", [None, 5])
def test_three_turns_with_a_cache_equal_the_whole_conversation_without(mimo, limit):
    """The same tokens and masks; each turn prefills itself alone (and the end token of an answer that was cut off)."""
    questions = [("Segment the liver.", {}), ("What is this?", {"boxes": [[3, 4, 30, 20]]}), ("And on the other side?", {})]
    chat = mimo.open(picture())
    past, prefilled = [], []
    for number, (question, marks) in enumerate(questions):
        before = mimo.engine.counts["prefilled"]
        answer = chat.ask(question, **marks, max_new_tokens=limit)
        prefilled.append(mimo.engine.counts["prefilled"] - before)
        request = Request(chat.image, question, Prompts(**marks), limit, past)
        ((whole, turn),) = mimo.generate([request])
        assert chat._past[-1].ids == turn.ids
        same(answer, whole)
        past = [*past, turn]
        cut_before = number > 0 and chat.answers[number - 1].truncated
        assert prefilled[-1] == len(encode_user_turn(mimo.tokenizer, mimo.config, question, number, number == 0)[0]) + cut_before
    assert len({a.text for a in chat.answers}) == 3


def test_features_and_caches_beyond_the_budget_are_made_again(mimo, tokenizer):
    """Two chats in a store that has room for one: the same answers, with images encoded again and the conversation prefilled again."""
    small = Mimo(mimo.config, mimo.engine.params, tokenizer)
    small.device_cache.budget = 1
    pairs = [(small.open(picture(seed=seed)), mimo.open(picture(seed=seed))) for seed in (0, 1)]
    for question in ("Segment the liver.", "What is this?"):
        for chat, kept in pairs:
            same(chat.ask(question), kept.ask(question))
    assert small.engine.counts["images"] > 2 and sum(image.nbytes > 0 for image in (pairs[0][0].image, pairs[1][0].image)) == 1
    assert [chat._cache.length > 0 for chat, _ in pairs] == [False, True]


def test_streamed_pieces_make_the_answer(mimo, tokenizer):
    asked = mimo.open(picture()).ask("Segment the liver.")
    chat = mimo.open(picture())
    events = list(chat.stream("Segment the liver."))
    assert "".join(e.text for e in events) == asked.text and len([e for e in events if e.text]) > 2
    same(events[-1].answer, asked)
    assert [e.entity for e in events if e.entity] == events[-1].answer.entities and chat.answers == [events[-1].answer]
    left = mimo.open(picture())
    stream = left.stream("Segment the liver.")
    next(stream)
    stream.close()
    assert not left.answers
    same(left.ask("Segment the liver."), asked)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["p_open", "p_close", "seg"]) | st.sampled_from([3 + b for b in b"<>/pSEG "]) | st.integers(3, 511), max_size=16
    ),
    st.integers(1, 5),
)
@example([63], 1)  # "<", which begins no tag
def test_a_stream_takes_nothing_back(mimo, ids, piece):
    """Whatever tokens come, bytes that are no text and spelt-out tags among them: what was told stays the start of the answer."""
    t = mimo.tokenizer
    ids = [getattr(t, i) if isinstance(i, str) else i for i in [*ids, *t.encode("a <p>b</p> <SEG> c")]]
    run = mimo.start(Request(mimo.open(picture()).image, "What is this?"))
    told = ""
    for n in range(0, len(ids) + piece, piece):
        run.generated_ids, run.done = [ids[:n]], n >= len(ids)
        text = run.text(0)
        assert run.done or text.startswith(told)
        told = text if len(text) > len(told) else told
    assert told == run._parse_row(0)[0]


def test_stop_strings_end_the_answer_before_them(mimo, tokenizer):
    chat = mimo.open(picture())
    whole = chat.ask("What is this?")
    middle = whole.text[len(whole.text) // 2 :][:3]
    at = whole.text.index(middle)
    stopping = mimo.open(picture())
    cut = stopping.ask("What is this?", stop=["never said", middle])
    assert cut.text == whole.text[:at] and not cut.truncated and "".join(p["text"] for p in cut.parts) == cut.text
    streamed = mimo.open(picture()).stream("What is this?", stop=[middle])
    assert "".join(e.text for e in streamed) == cut.text
    requests = [Request(chat.image, "What is this?", sampling=Sampling(stop=(middle,))), Request(chat.image, "What is this?")]
    assert [a.text for a in mimo.predict(requests)] == [cut.text, whole.text]
    # The next turn stands behind what was kept.
    same(stopping.ask("Is there a liver?"), mimo.predict([Request(chat.image, "Is there a liver?", past=stopping._past[:1])])[0])


def test_a_warm_model_compiles_nothing_in_a_request(tokenizer):
    config = tiny_config(max_turns=2)
    config.generate.max_new_tokens = 12
    model = Mimo(config, random_params(config, 5), tokenizer)
    model.warm_up()
    compiled = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for seed in range(2):
            chat = model.open(picture(30 + seed, 50, seed))
            for question in ("Segment the liver.", "What is this? " * 3, "Where?", "Is there a liver in it?", "Why?", "And then?"):
                chat.ask(question, boxes=[[2, 2, 9, 9]], temperature=seed)
            assert len([*chat.stream("What is this?", stop=["x"])]) > 1
        assert compiled == []
        model.open(picture()).ask("What is this? " * 9)  # longer than the aligner reads
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_turns_of_different_number_share_a_batch(mimo):
    chat = mimo.open(picture())
    ((_, past),) = mimo.generate([Request(chat.image, "Segment the liver.")])
    requests = [Request(chat.image, "What is this?", past=[past]), Request(chat.image, "What is this?")]
    requests.append(Request(chat.image, "What is this?", past=[past, past]))
    together = mimo.predict(requests)
    for request, one in zip(requests, together, strict=True):
        same(one, mimo.predict([request])[0])
    assert together[0].text != together[1].text


@pytest.mark.parametrize(
    "error, kwargs",
    [
        ("question: is empty", {"question": "  "}),
        ("the context of 256 leaves no room", {"question": "Where is the liver? " * 90}),
        ("finite", {"points": [[float("nan"), 3, 1]]}),
        ("label 2", {"points": [[3, 3, 2]]}),
        ("is outside the image of 56x40", {"points": [[70, 3, 1]]}),
        ("has no area", {"boxes": [[9, 9, 9, 20]]}),
        ("exceeds the image of 56x40", {"boxes": [[-9, 9, 9, 20]]}),
        ("scribble 0", {"scribbles": [[[3, 3], [3, 99]]]}),
        ("shape", {"points": [[3, 3]]}),
        ("this model accepts 12 per turn", {"points": [[3, 3, 1]] * 13}),
        ("max_new_tokens: is 0", {"max_new_tokens": 0}),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line_and_leaves_the_chat(mimo, error, kwargs):
    chat = mimo.open(picture())
    with pytest.raises(UserError, match=error) as raised:
        chat.ask(**({"question": "What is this?"} | kwargs))
    assert "\n" not in str(raised.value) and not chat.answers and not chat._past


@pytest.mark.parametrize("kind", ["linear", "none"])
def test_every_kind_of_aligner_answers_and_the_text_only_ones_refuse_prompts(tokenizer, kind):
    config = tiny_config()
    config.model.aligner = dataclasses.replace(config.model.aligner, kind=kind)
    config.generate.max_new_tokens = 24
    model = Mimo(config, random_params(config), tokenizer)
    pointed = Request(picture(), "What is this?", Prompts(points=[[3, 3, 1]]))
    with Said(model, grounded(tokenizer, "liver")) as said:
        model.predict([dataclasses.replace(pointed, prompts=Prompts())])
    assert (said.calls[0][2] >= 0).sum() == said.calls[0][0].shape[2] == config.model.query_tokens()
    if kind == "none":
        assert model.predict([pointed])[0].text
    else:
        with pytest.raises(UserError, match="takes no points"):
            model.predict([pointed])


def test_lisas_layout_answers_and_paints_bare_segs(tmp_path):
    config = tiny_config(seg_state="predict", seg_position="bare")
    config.model.aligner.kind, config.data.image_tokens = "linear", "<im_start>,<im_end>"
    config.generate.max_new_tokens = 24
    t = lisa_tokenizer(tmp_path)
    with Said(Mimo(config, random_params(config), t), [*t.encode("It is"), t.seg, *t.encode(".", continued=True), t.eos]) as said:
        answer = said.mimo.open(picture()).ask("Segment the liver.")
    assert answer.text == "It is." and [e.phrase for e in answer.entities] == [""] and answer.entities[0].mask.shape == (40, 56)
    _, ids, query_index, _, lengths = said.calls[0]
    assert ids[0, : lengths[0]][query_index[0, : lengths[0]] < 0].tolist() == [
        *(t.bos, *t.encode("USER:"), t.id_of("<im_start>"), t.id_of("<im_end>"), *t.encode("Segment the liver. ASSISTANT:"))
    ]


def test_images_from_files_and_arrays(mimo, tmp_path):
    pixels = picture()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(mimo.open(tmp_path / "a.png").image.pixels, pixels)
    grey = mimo.open(pixels[..., 0]).image.pixels
    assert grey.shape == (40, 56, 3) and (grey == pixels[..., :1]).all()
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    (tmp_path / "c.png").write_text("no image")
    for bad in (tmp_path / "b.png", tmp_path / "c.png", tmp_path / "d.png", pixels.astype(float), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(UserError, match="b.png|c.png|d.png|image: an array"):
            mimo.open(bad)


def test_answers_are_saved_by_their_ending(mimo, tokenizer, tmp_path):
    with Said(mimo, grounded(tokenizer, "liver", "spleen")):
        answer = mimo.open(picture()).ask("Segment both.", boxes=[[1, 1, 9, 9]])
    paths = [tmp_path / name for name in ("a.png", "a.json", "a.npy")]
    answer.save(*paths)
    assert Image.open(paths[0]).width >= 56
    assert json.loads(paths[1].read_text()) == json.loads(json.dumps(answer.to_json()))
    np.testing.assert_array_equal(np.load(paths[2]), np.stack([e.mask for e in answer.entities]))
    for bad in ("a.gif", "none/a.png"):
        with pytest.raises(UserError, match="a.gif|none"):
            answer.save(tmp_path / "b.json", tmp_path / bad)
    assert not (tmp_path / "b.json").exists()


def test_medical_files_are_opened_asked_about_and_answered_on_their_grid(mimo, tokenizer, tmp_path):
    volume = np.random.default_rng(0).integers(0, 999, (30, 20, 4)).astype(np.int16)
    path = nifti(tmp_path / "a.nii.gz", volume, np.diag([2.0, 3, 4, 1]))
    chat = mimo.open(path, slice="axial:2", window=(0, 999))
    np.testing.assert_array_equal(chat.image.pixels, open_image(path, slice="axial:2", window=(0, 999)).pixels)
    with Said(mimo, grounded(tokenizer, "liver", "spleen")):
        answer = chat.ask("Segment both.")
    answer.save(tmp_path / "b.nii.gz", tmp_path / "b.json")
    labels = np.asanyarray(nibabel.load(tmp_path / "b.nii.gz").dataobj)
    liver, spleen = (e.mask[::-1, ::-1].T for e in answer.entities)
    np.testing.assert_array_equal(labels[:, :, 2], np.where(spleen, 2, liver))
    assert not labels[:, :, [0, 1, 3]].any()
    for e, row in zip(answer.entities, json.loads((tmp_path / "b.json").read_text())["entities"], strict=True):
        assert e.area_mm2 == row["area_mm2"] == 6 * e.area_px

    frames = np.random.default_rng(0).integers(0, 999, (3, 20, 30)).astype(np.uint16)
    chat = mimo.open(saved(dicom(frames, frames=3), tmp_path / "c.dcm"), frame=2, window="soft")
    with Said(mimo, grounded(tokenizer, "liver")):
        assert chat.ask("Segment it.").entities[0].area_mm2 == chat.answers[0].entities[0].area_px * 0.125
    assert mimo.open(open_image(path, slice="k:0")).image.picture.grid.index == 0


@pytest.mark.parametrize("error, chosen", [("frame 0: applies only to a file", {"frame": 0}), ("slice k:1: applies", {"slice": "k:1"})])
def test_frame_and_slice_are_refused_with_pixels(mimo, error, chosen):
    for image in (picture(), MedicalImage(picture())):
        with pytest.raises(UserError, match=error):
            mimo.open(image, **chosen)


def test_load_answers_as_the_model_that_was_saved(mimo, tokenizer, tmp_path):
    frozen, train = pathtree.partition(mimo.engine.params, lambda path: path.startswith("vision/"))
    checkpoint.open_run(tmp_path, mimo.config)
    (tmp_path / "tokenizer.json").write_bytes(open(tokenizer.path, "rb").read())
    checkpoint.start_run(tmp_path, mimo.config, frozen)
    steps = checkpoint.Checkpoints(tmp_path)
    steps.save(3, {"params": train, "opt": {}, "step": jnp.int32(3)}, {})
    steps.wait()
    same(Mimo.load(tmp_path).open(picture()).ask("What is this?"), mimo.open(picture()).ask("What is this?"))
    with pytest.raises(UserError, match="nothing_here"):
        Mimo.load(tmp_path / "nothing_here")


def test_parameters_of_another_model_are_refused(mimo, tokenizer):
    config = tiny_config()
    config.model.aligner = dataclasses.replace(config.model.aligner, queries=7)
    with pytest.raises(UserError, match=r"1 parameters do not fit its model config: aligner/queries \(\(4, 16\), not \(7, 16\)\)"):
        Mimo(config, mimo.engine.params, tokenizer)


def test_buckets_hold_their_lengths_and_are_few():
    made = [bucket(n) for n in range(1, 2049)]
    assert all(b >= n and (n <= 32 or b < 2 * n) for n, b in enumerate(made, 1))
    assert len(set(made)) <= 12
    assert len({cache_bucket(n) for n in range(1, 2049)}) <= 9 and all(cache_bucket(n) >= n for n in range(1, 2049))


def test_an_extreme_shape_is_warned_of():
    def image(height, width):
        pixels = MedicalImage(np.zeros((height, width, 3), np.uint8))
        return EncodedImage(pixels, vision_frame(height, width, 336, "pad"), sam_frame(height, width, 1024, "pad"))

    (line,) = image(30, 20000).warnings
    assert line.startswith("extreme shape: the model sees 20000x30 pixels as 336x1, and outlines structures in 1024x2; cut")
    assert image(100, 1500).warnings == ()
