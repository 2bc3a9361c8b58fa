"""Batches: their arrays, their order, resuming, sharing among processes, and samples that cannot be used."""

import dataclasses
import hashlib
from collections import Counter

import numpy as np
import pytest

from mimo_jax.config import PERSPECTIVES, SourceConfig
from mimo_jax.data.conversation import SampleError, render
from mimo_jax.data.loading.collate import make_example, sample_prompts, smallest_bucket, stack_batch
from mimo_jax.data.loading.loader import GlobalOrder, make_loader
from mimo_jax.data.loading.sources import open_sources
from mimo_jax.data.loading.token_counts import token_overhead
from mimo_jax.data.prompts import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NONE
from mimo_jax.data.records import DataError, write_records
from mimo_jax.data.schema import Sample, Target, Turn
from mimo_jax.geometry import vision_frame
from tests.data import handmade
from tests.tiny_config import random_batch, tiny_config

QUANTIZATIONS = {"vqa": 1.0, "I": 1.0, "II": 2.0, "III": 2.0, "IV": 1.0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return handmade.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def lisa_tokenizer(tmp_path_factory):
    return handmade.lisa_tokenizer(tmp_path_factory.mktemp("lisa"))


def long_record(number):
    """Some of its samples need the second bucket."""
    record = handmade.record(number)
    if number % 3 == 0:
        for sample in record.samples:
            sample.turns[0] = dataclasses.replace(sample.turns[0], text=sample.turns[0].text + " Please ▁ 肝" * 6)
    return record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("set") / "train"
    write_records(path, [long_record(i) for i in range(12)], {})
    return path


def config_for(*folders, **data):
    config = tiny_config()
    config.data = dataclasses.replace(
        config.data, sources={f"s{i}": SourceConfig(path=str(f)) for i, f in enumerate(folders)}, weights=dict(QUANTIZATIONS), **data
    )
    config.validate()
    return config


def loader_for(config, tokenizer, process=0, processes=1):
    """The loader of one of so many processes that share each batch in blocks."""
    images = config.data.batch_size // config.data.samples_per_image // processes
    return make_loader(config, tokenizer, open_sources(config, "train"), range(process * images, (process + 1) * images))


def take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


def test_arrays_are_those_of_the_contract(folder, tokenizer):
    config = config_for(folder)
    for batch in take(loader_for(config, tokenizer), 4):
        length = batch["input_ids"].shape[1]
        wanted = random_batch(config, length=length)
        assert length in config.buckets()
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (v.shape, v.dtype) for k, v in wanted.items()}
        tokens = batch["token_mask"].sum(1)
        assert (batch["token_mask"] == (np.arange(length) < tokens[:, None])).all()
        assert (batch["input_ids"][~batch["token_mask"]] == 0).all() and (batch["query_index"][~batch["token_mask"]] == -1).all()
        rows = np.arange(len(tokens))[:, None]
        assert ((batch["input_ids"][rows, batch["seg_index"]] == tokenizer.seg) == batch["seg_mask"]).all()
        assert ((batch["input_ids"] == tokenizer.seg).sum(1) == batch["seg_mask"].sum(1)).all()
        assert (batch["masks"].any((2, 3)) == batch["seg_mask"]).all()
        assert (batch["sample_weight"] == 1).all()


def test_a_batch_is_what_make_example_and_stack_batch_make(folder, tokenizer):
    config = config_for(folder, samples_per_image=1)
    order = GlobalOrder(config, tokenizer, open_sources(config, "train"))
    for number, batch in enumerate(take(loader_for(config, tokenizer), 3)):
        bucket, drawn = order.batch(number)
        examples = []
        for image in drawn:
            record = order.sources[image.source][image.record]
            rng = np.random.default_rng([image.seed, 0])
            examples.append(make_example(record, record.samples[image.samples[0]], tokenizer, config, rng))
        assert same(batch, stack_batch(examples, bucket))


def test_target_and_prompt_of_a_known_record(tokenizer):
    config = tiny_config()
    config.train.loss.attention_map = 1.0
    record = handmade.record(0)
    naming = next(s for s in record.samples if s.perspective == "II")
    example = make_example(record, naming, tokenizer, config, np.random.default_rng(0))["samples"][0]
    mask = record.mask("l").decode()
    # SAM frame 64, M 32: one cell is 56/64 * 2 = 1.75 pixels of the original.
    cells = np.argwhere(example["masks"][0])
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert np.abs(cells.min(0) * 1.75 - (rows[0], cols[0])).max() < 1.75
    assert np.abs((cells.max(0) + 1) * 1.75 - (rows[-1] + 1, cols[-1] + 1)).max() < 1.75
    assert example["masks"][1:].sum() == 0 and example["seg_mask"].tolist() == [True, False, False]
    looked = np.argwhere(example["attention_target"][0])  # CLIP frame 32, patches of 8: one cell is 56/32 * 8 = 14 pixels
    assert example["attention_target_mask"].tolist()[0] and np.abs(looked.min(0) * 14 - (rows[0], cols[0])).max() < 14
    used = example["prompt_kind"][0] != NONE
    xy = vision_frame(40, 56, 32, "pad").from_frame(example["prompt_xy"][0][used])
    top, left, bottom, right = rows[0], cols[0], rows[-1], cols[-1]
    assert used.any() and (xy >= (left - 7, top - 7)).all() and (xy <= (right + 7, bottom + 7)).all()
    plain = make_example(record, record.samples[0], tokenizer, config, np.random.default_rng(0))["samples"][0]
    assert (plain["prompt_kind"] == NONE).all()


def test_arrays_of_lisas_layout(folder, lisa_tokenizer):
    config = config_for(folder)
    config.model.seg_position, config.data.image_tokens = "bare", "<im_start>,<im_end>"
    for batch in take(loader_for(config, lisa_tokenizer), 2):
        rows = np.arange(len(batch["input_ids"]))[:, None]
        assert ((batch["input_ids"][rows, batch["seg_index"]] == 512) == batch["seg_mask"]).all()
        assert (batch["input_ids"] <= 512).all() and ((batch["input_ids"] == 512).sum(1) == batch["seg_mask"].sum(1)).all()
        queries = batch["query_index"] >= 0
        before, after = queries.argmax(1) - 1, queries.argmax(1) + queries.sum(1)
        assert (batch["input_ids"][rows[:, 0], before] == 510).all() and (batch["input_ids"][rows[:, 0], after] == 511).all()


@pytest.mark.parametrize("fit", ["pad", "stretch", "crop"])
def test_without_their_loss_looks_are_not_made_and_every_fit_serves(fit, tokenizer):
    config = tiny_config()
    config.model.vision.image_fit = fit
    for record in map(handmade.record, range(3)):
        for sample in record.samples[:3]:
            example = make_example(record, sample, tokenizer, config, np.random.default_rng(0))["samples"][0]
            assert not example["attention_target"].any() and not example["attention_target_mask"].any()


def test_samples_of_an_image_stand_together(folder, tokenizer):
    config = config_for(folder, batch_size=8, samples_per_image=4)
    order = GlobalOrder(config, tokenizer, open_sources(config, "train"))
    for number in range(8):
        for image in order.batch(number)[1]:
            samples = order.sources[0].samples(image.record)
            picked = [samples[i] for i in image.samples]
            held = {i for i, s in enumerate(samples) if s.perspective == picked[0].perspective}
            assert len(picked) == 4 and held <= set(image.samples)  # four or fewer of each: all of them
            assert set(image.samples) == held or len(set(image.samples)) == 4  # then again, or others
    batch = take(loader_for(config, tokenizer), 1)[0]
    assert batch["vision_image"].shape[0] == 2 and batch["input_ids"].shape[0] == 8


def test_repeated_samples_get_new_prompts(folder, tokenizer):
    config = config_for(folder, batch_size=4, samples_per_image=4)
    config.data.weights = {"IV": 1.0}
    batch = take(loader_for(config, tokenizer), 1)[0]
    assert (batch["input_ids"] == batch["input_ids"][0]).all()
    assert len({row.tobytes() for row in batch["prompt_xy"]}) == 4


def test_every_sample_comes_once_an_epoch(folder, tokenizer):
    config = config_for(folder, batch_size=12, samples_per_image=1)
    config.data.weights = {"I": 1.0}
    order = GlobalOrder(config, tokenizer, open_sources(config, "train"))
    epochs = [[(i.record, i.samples, i.seed) for i in (order.sequence[n] for n in range(e * 48, e * 48 + 48))] for e in range(2)]
    for epoch in epochs:
        assert len({row[:2] for row in epoch}) == 48
    assert [row[:2] for row in epochs[0]] != [row[:2] for row in epochs[1]]
    assert len({row[2] for epoch in epochs for row in epoch}) == 96


def test_mixture_of_perspectives_and_sources(tmp_path, folder, tokenizer):
    write_records(tmp_path / "b", [handmade.record(100 + i) for i in range(3)], {})
    config = config_for(folder, tmp_path / "b", samples_per_image=1)
    config.data.sources["s1"].weight = 3.0
    config.data.sources["s1"].perspectives = "II, III"
    order = GlobalOrder(config, tokenizer, open_sources(config, "train"))
    n = 10_000
    drawn = [order.sequence[i] for i in range(n)]
    indices = [source.index for source in order.sources]
    kinds = [PERSPECTIVES[indices[d.source].perspective[indices[d.source].first[d.record] + d.samples[0]]] for d in drawn]
    share = Counter(kinds)
    assert all(share[p] / n == pytest.approx(w / 7, rel=0.02) for p, w in QUANTIZATIONS.items())
    both = Counter((k, d.source) for k, d in zip(kinds, drawn, strict=True))
    assert both["I", 1] == both["vqa", 1] == 0
    for p in ("II", "III"):
        assert both[p, 1] / share[p] == pytest.approx(0.75, rel=0.02)


def test_perspective_that_no_source_holds(folder, tmp_path, tokenizer):
    records = [dataclasses.replace(r, samples=[s for s in r.samples if s.perspective != "vqa"]) for r in map(handmade.record, range(2))]
    write_records(tmp_path / "b", records, {})
    config = config_for(tmp_path / "b")
    with pytest.raises(DataError, match=r"config.data.weights.vqa: is 1, but no source \(s0\) has a sample of vqa in split train"):
        loader_for(config, tokenizer)
    config.data.weights["vqa"] = 0.0
    assert len(take(loader_for(config, tokenizer), 1)) == 1
    config.data.weights = dict.fromkeys(PERSPECTIVES, 0.0)
    with pytest.raises(DataError, match="all are 0"):
        loader_for(config, tokenizer)


def test_buckets_fit_and_sorting_moves_batches_only_within_a_window(folder, tokenizer):
    config = config_for(folder, length_grouping=4)
    flat = config_for(folder, length_grouping=1)
    order, plain = (GlobalOrder(c, tokenizer, open_sources(c, "train")) for c in (config, flat))
    long, long_plain = 0, 0
    for window in range(6):
        made = [order.batch(n) for n in range(4 * window, 4 * window + 4)]
        unsorted = [plain.batch(n) for n in range(4 * window, 4 * window + 4)]
        assert sorted(i for _, images in made for i in images) == sorted(i for _, images in unsorted for i in images)
        for bucket, images in made + unsorted:
            lengths = [len(render(order.sources[0].samples(i.record)[s], tokenizer, config).input_ids) for i in images for s in i.samples]
            assert bucket == smallest_bucket(max(lengths), (96, 192))
        long += sum(bucket == 192 for bucket, _ in made)
        long_plain += sum(bucket == 192 for bucket, _ in unsorted)
    assert 0 < long < long_plain


def test_bucket_of_texts_with_a_token_a_byte(tmp_path, tokenizer):
    records = []
    for number in range(24):  # 3 tokens a letter, from well below the first bucket's end to beyond it
        record = handmade.record(number)
        question = Turn("user", "肝" * (8 + number))
        naming = dataclasses.replace(record.samples[4], turns=[question, record.samples[4].turns[1]])
        records.append(dataclasses.replace(record, samples=[naming]))
    write_records(tmp_path / "b", records, {})
    config = config_for(tmp_path / "b", batch_size=1, samples_per_image=1, length_grouping=1)
    config.data.weights = {"II": 1.0}
    order = GlobalOrder(config, tokenizer, open_sources(config, "train"))
    found = Counter()
    for bucket, (image,) in (order.batch(n) for n in range(24)):
        sample = order.sources[0].samples(image.record)[0]
        assert bucket == smallest_bucket(len(render(sample, tokenizer, config).input_ids), (96, 192))
        found[bucket] += 1
    assert min(found[96], found[192]) > 3


@pytest.mark.parametrize("letter", ["\x01", "a"])
@pytest.mark.parametrize("place", ["inside", "after", "bare"])
def test_no_sample_takes_more_than_a_token_a_byte_and_the_overhead(tokenizer, lisa_tokenizer, place, letter):
    config = tiny_config(seg_position=place, max_segs=1, max_turns=2)
    config.data.image_tokens = "<im_start>,<im_end>" if place == "bare" else ""
    t = lisa_tokenizer if place == "bare" else tokenizer
    turns = [Turn(role, 3 * letter) for role in ("user", "assistant") * 2]
    sample = Sample("s", "I", turns, [Target(1, "a", [0, 3], ["l"])])
    assert len(render(sample, t, config).input_ids) <= 3 * len(turns) + token_overhead(config, t)


@pytest.mark.parametrize("augment", [False, True])
def test_resume_is_bit_identical(folder, tokenizer, augment):
    config = config_for(folder, augment=augment)
    whole = take(loader_for(config, tokenizer), 105)  # an epoch of I is 6 batches of it
    first = loader_for(config, tokenizer)
    take(first, 5)
    assert first.state() == {"batch": 5}
    again = loader_for(config, tokenizer)
    again.restore(first.state())
    assert all(same(a, b) for a, b in zip(take(again, 100), whole[5:], strict=True))
    first.restore({"batch": 2})  # back, in the same loader
    assert all(same(a, b) for a, b in zip(take(first, 4), whole[2:6], strict=True))


def test_seed_and_cache_and_augmentation(folder, tokenizer):
    plain = take(loader_for(config_for(folder), tokenizer), 9)
    assert all(same(a, b) for a, b in zip(take(loader_for(config_for(folder, cache_mb=0), tokenizer), 9), plain, strict=True))
    assert not any(same(a, b) for a, b in zip(take(loader_for(config_for(folder, seed=4), tokenizer), 9), plain, strict=True))
    moved = take(loader_for(config_for(folder, augment=True), tokenizer), 9)
    for a, b in zip(moved, plain, strict=True):
        assert np.array_equal(a["input_ids"], b["input_ids"]) and not np.array_equal(a["sam_image"], b["sam_image"])
        assert (a["masks"].any((2, 3)) == a["seg_mask"]).all()
    assert any(not np.array_equal(a["masks"], b["masks"]) for a, b in zip(moved, plain, strict=True))


def test_augmented_targets_stay_on_their_pixels_at_every_visit(tmp_path, tokenizer):
    record = handmade.record(0)
    write_records(tmp_path / "b", [dataclasses.replace(record, samples=[record.samples[0]])], {})
    config = config_for(tmp_path / "b", batch_size=1, samples_per_image=1, augment=True)
    config.data.weights = {"I": 1.0}
    seen = set()
    for batch in take(loader_for(config, tokenizer), 8):
        target = batch["masks"][0, 0].repeat(2, 0).repeat(2, 1) == 1  # M 32 -> SAM frame 64
        image = batch["sam_image"][0].mean(-1)
        assert image[target].mean() > 140 and (image[target] > 110).mean() > 0.8  # the liver is 200, what is around it below 64
        assert (image[~target] > 140).sum() < 0.25 * target.sum()
        seen.add(batch["masks"].tobytes())
    assert len(seen) == 8


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_sequence(folder, tokenizer, processes):
    config = config_for(folder, batch_size=8)
    whole = take(loader_for(config, tokenizer), 4)
    parts = [take(loader_for(config, tokenizer, p, processes), 4) for p in range(processes)]
    for number, batch in enumerate(whole):
        local = [part[number] for part in parts]
        assert len({tuple((k, v.shape) for k, v in part.items()) for part in local}) == 1
        for key, value in batch.items():
            assert np.array_equal(np.concatenate([part[key] for part in local]), value), key


def test_a_process_makes_the_images_that_it_is_asked_for(folder, tokenizer):
    """Whichever they are: a mesh may give a process no block."""
    config = config_for(folder, batch_size=8)
    (whole,) = take(loader_for(config, tokenizer), 1)
    (part,) = take(make_loader(config, tokenizer, open_sources(config, "train"), [0, 3]), 1)
    assert np.array_equal(part["sam_image"], whole["sam_image"][[0, 3]])
    assert np.array_equal(part["masks"], whole["masks"][[0, 1, 6, 7]])


def test_the_records_of_a_batch_are_named_without_making_it(folder, tokenizer):
    config = config_for(folder, batch_size=4, samples_per_image=1, length_grouping=1)
    config.data.weights = {"vqa": 1.0}
    loader = loader_for(config, tokenizer)
    order = [loader.records(number) for number in range(3)]  # a pass
    ids = [record_id.decode() for record_id in open_sources(config, "train")["s0"].index.ids]
    assert sorted(sum(order, [])) == sorted(ids)
    assert [loader_for(config, tokenizer, 1, 2).records(number) for number in range(3)] == order


def share_of(batch, process, processes):
    """What `process` makes of a whole batch, one with a sample an image."""
    return {key: value[process * len(value) // processes : (process + 1) * len(value) // processes] for key, value in batch.items()}


def test_another_number_of_processes_goes_on_with_the_sequence(folder, tokenizer):
    config = config_for(folder, batch_size=8, samples_per_image=1)
    whole = take(loader_for(config, tokenizer), 6)
    states = []
    for process in range(4):
        loader = loader_for(config, tokenizer, process, 4)
        assert all(same(a, share_of(b, process, 4)) for a, b in zip(take(loader, 3), whole[:3], strict=True))
        states.append(loader.state())
    assert states == [states[0]] * 4
    for processes in (1, 2):
        for process in range(processes):
            loader = loader_for(config, tokenizer, process, processes)
            loader.restore(states[0])
            assert all(same(a, share_of(b, process, processes)) for a, b in zip(take(loader, 3), whole[3:], strict=True))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_an_unmixed_pass_sees_every_record_once(folder, tokenizer, processes):
    config = config_for(folder, batch_size=4, samples_per_image=1, length_grouping=3)  # within a pass
    config.data.weights = {"vqa": 1.0}  # one a record, 12 records
    parts = [take(loader_for(config, tokenizer, process, processes), 6) for process in range(processes)]
    for epoch in (0, 3):
        seen = Counter(image.tobytes() for part in parts for batch in part[epoch : epoch + 3] for image in batch["sam_image"])
        assert len(seen) == 12 and set(seen.values()) == {1}


def test_worker_processes_make_the_same_batches(folder, tokenizer):
    config = config_for(folder)
    whole = take(loader_for(config, tokenizer), 5)
    workers = config_for(folder, workers=2)
    loader = loader_for(workers, tokenizer)
    loader.restore({"batch": 1})
    assert all(same(a, b) for a, b in zip(take(loader, 4), whole[1:], strict=True))
    apart = config_for(folder, batch_size=8, samples_per_image=1)
    whole = take(loader_for(apart, tokenizer), 3)
    apart.data.workers = 1
    made = take(loader_for(apart, tokenizer, 3, 4), 3)
    assert all(same(a, share_of(b, 3, 4)) for a, b in zip(made, whole, strict=True))


def spoilt(number):
    record = handmade.record(number)
    if number == 0:
        return dataclasses.replace(record, image=record.image[:60])
    if number == 1:  # one sample is too long
        record.samples[8].turns[0] = Turn("user", "liver " * 300)
    return record


def test_unusable_samples_are_placeholders_and_counted(tmp_path, tokenizer):
    write_records(tmp_path / "b", [spoilt(i) for i in range(4)], {})
    config = config_for(tmp_path / "b", samples_per_image=1)
    config.train.max_bad_samples = 0.5
    loader = loader_for(config, tokenizer)
    order = GlobalOrder(config, tokenizer, open_sources(config, "train"))
    blanks = 0
    for number, batch in enumerate(take(loader, 40)):
        for row, image in enumerate(order.batch(number)[1]):
            lost = image.record == 0 or (image.record == 1 and image.samples == (8,))
            assert batch["sample_weight"][row] == (not lost)
            blanks += lost
            if lost:
                assert batch["token_mask"][row].sum() == 1
                assert not batch["loss_mask"][row].any() and not batch["seg_mask"][row].any() and not batch["masks"][row].any()
            assert (image.record == 0) == (not batch["sam_image"][row].any())
    assert blanks > 20
    assert Counter(row["record"] for row in loader.bad) == {"image000": 9, "image001": 1}
    reasons = {row["record"]: row["reason"] for row in loader.bad}
    assert "record image000" in reasons["image000"] and "raise the largest of config.data.buckets" in reasons["image001"]
    assert next(row["sample"] for row in loader.bad if row["record"] == "image001") == "image001#8"


def test_prompts_on_several_masks_fit(tokenizer):
    cfg = tiny_config().model.prompt  # 12 tokens, a scribble takes 4
    record = handmade.record(0)
    masks = [record.mask("l").decode(), record.mask("s").decode()] * 3
    for seed in range(20):
        prompts = sample_prompts(masks, np.random.default_rng(seed), cfg)
        tokens = len(prompts.points) + 2 * len(prompts.boxes) + cfg.scribble_points * len(prompts.scribbles)
        assert tokens <= cfg.max_tokens and len(prompts.boxes) == 6
        few = sample_prompts(masks[:2], np.random.default_rng(seed), cfg)
        assert len(few.points) + 2 * len(few.boxes) + cfg.scribble_points * len(few.scribbles) <= cfg.max_tokens
    with pytest.raises(SampleError, match="7 masks in one turn; raise config.model.prompt.max_tokens"):
        sample_prompts([*masks, masks[0]], np.random.default_rng(0), cfg)


def test_prompts_are_of_the_kinds_asked_for_where_they_fit():
    cfg = tiny_config().model.prompt  # 12 tokens, a scribble takes 4
    mask = handmade.record(0).mask("l").decode()
    for seed in range(20):
        drawn = sample_prompts([mask] * 4, np.random.default_rng(seed), cfg, kinds=("scribble",))
        assert (len(drawn.points), len(drawn.boxes), len(drawn.scribbles)) == (0, 2, 2)  # the rest has room for boxes alone


def test_only_the_kinds_of_prompts_that_are_configured_are_drawn(folder, tokenizer):
    config = config_for(folder, prompt_kinds="box")
    kinds = {int(kind) for batch in take(loader_for(config, tokenizer), 10) for kind in batch["prompt_kind"].ravel()}
    assert kinds == {NONE, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT}


def test_a_larger_share_of_the_data_holds_all_of_a_smaller_one(tmp_path, tokenizer):
    """Whole patients are in or out."""
    records = [dataclasses.replace(handmade.record(i), group=f"patient {i // 2}") for i in range(60)]
    write_records(tmp_path / "b", records, {})
    held = []
    for share in (0.25, 0.5, 0.75, 1.0):
        config = config_for(tmp_path / "b", fraction=share, samples_per_image=1)
        order = GlobalOrder(config, tokenizer, open_sources(config, "train"))
        seen = Counter(image.record for number in range(200) for image in order.batch(number)[1])
        assert {record ^ 1 for record in seen} == set(seen)
        assert order.total == 9 * len(seen)
        held.append(set(seen))
    assert held[0] < held[1] < held[2] < held[3] == set(range(60))
    assert [abs(len(records) / 60 - share) < 0.2 for records, share in zip(held, (0.25, 0.5, 0.75), strict=False)] == [True] * 3


def test_a_share_that_holds_nothing_of_a_perspective_is_refused(tmp_path, tokenizer):
    write_records(tmp_path / "b", [handmade.record(0)], {})
    with pytest.raises(DataError, match=r"no source \(s0\) has a sample of vqa in split train \(config.data.fraction 1e-06\)"):
        loader_for(config_for(tmp_path / "b", fraction=1e-6), tokenizer)


def test_targets_are_made_at_the_side_at_which_they_are_compared(folder, tokenizer):
    config = config_for(folder)
    own = take(loader_for(config, tokenizer), 1)[0]["masks"]
    config.train.loss.mask_side = 2 * config.model.mask_side()
    (batch,) = take(loader_for(config, tokenizer), 1)
    assert batch["masks"].shape == (*own.shape[:2], *(2 * side for side in own.shape[2:]))
    shrunk = batch["masks"].reshape(*own.shape[:3], 2, own.shape[3], 2).mean((3, 5))
    assert np.abs(shrunk - own).max() <= 0.5  # the same masks, of twice as many pixels


def test_the_order_of_a_dataset_stays_what_it_is(folder, tokenizer):
    """A resumed run goes on with the sequence that it began with, also in a later version."""
    config = config_for(folder, samples_per_image=1, length_grouping=3)
    order = GlobalOrder(config, tokenizer, open_sources(config, "train"))
    batches = [(bucket, [tuple(image) for image in images]) for bucket, images in map(order.batch, range(40))]
    assert hashlib.sha256(repr(batches).encode()).hexdigest()[:16] == "32ca5961adbf7c34"
