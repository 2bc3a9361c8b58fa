"""Arrays of one image with its samples, and batches of several: the same for training, evaluation and inference.

Axis letters: B samples, K samples of an image, N images, T sequence bucket, R user turns, L instruction ids, P prompt
tokens, S `<SEG>` slots, M side of the target masks. H, W in docstrings are the height and width of an image.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from mimo_jax.config import PROMPT_KINDS, Config
from mimo_jax.data.conversation import Rendered, SampleError, render
from mimo_jax.data.prompts import Prompts, draw_outside, draw_prompts, encode_prompts, joined
from mimo_jax.data.schema import Record, RecordError, Sample
from mimo_jax.data.tokenizer import Tokenizer
from mimo_jax.data.transforms import content_sizes, decode_image, mask_to_frame, preprocess, vision_image
from mimo_jax.geometry import Frame, sam_frame, vision_frame
from mimo_jax.model_config import ModelConfig, PromptConfig

_MAX_POINT_TOKENS = 4  # maximum number of tokens of a sampled point prompt: three points inside, one outside


def make_example(record: Record, sample: Sample, tokenizer: Tokenizer, config: Config, rng: np.random.Generator) -> dict:
    """One image with one sample, as input of `stack_batch`. Raises ImageError, RecordError or SampleError if it is unusable.

    Keys of `transforms.preprocess` (one image), and `samples`: a list of dicts of the other arrays of
    a batch, without padding along T. `rng` samples the prompts: the same state gives the same example.
    """
    image = record_image(record)
    rendered = render(sample, tokenizer, config)
    masks = {mask_id: record.mask(mask_id).decode() for mask_id in required_mask_ids(rendered)}
    return {**preprocess(image, config.model), "samples": [sample_arrays(sample.sample_id, rendered, masks, image.shape[:2], config, rng)]}


def record_image(record: Record) -> np.ndarray:
    """uint8 RGB [H, W, 3] of a record; its `window` is applied if the stored file has more than 8 bits. Raises ImageError,
    or RecordError if the image does not have the record's size."""
    deep = record.image[:8] == b"\x89PNG\r\n\x1a\n" and record.image[24:25] == b"\x10"  # bit depth in the PNG header
    window = tuple(record.window) if deep and record.window else None
    image = decode_image(record.image, window=window, name=f"record {record.id}")
    if image.shape[:2] != (record.height, record.width):
        raise RecordError(
            f"record {record.id}: the image is {image.shape[1]}x{image.shape[0]}, but the record has {record.width}x{record.height}"
        )
    return image


def required_mask_ids(rendered: Rendered) -> list[str]:
    """Ids, without duplicates, of the masks that a sample segments, points at or answers about."""
    answered = [ids for ids in rendered.answer_masks if ids]
    return list(dict.fromkeys(mask_id for ids in [*rendered.seg_targets, *rendered.prompted, *answered] for mask_id in ids))


def sample_arrays(
    name: str,
    rendered: Rendered,
    masks: dict[str, np.ndarray],
    size: tuple[int, int],
    config: Config,
    rng: np.random.Generator,
    target_cache: dict[tuple, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of one sample, without batch axis. masks: bool [H, W] by id; size: (H, W); target_cache: resized targets by the ids of
    their masks and side, kept for the next call on the same image."""
    model = config.model
    arrays = padding_sample(config)
    count = len(rendered.seg_positions)
    for turn, ids in enumerate(rendered.instructions):
        arrays["instruction_ids"][turn, : len(ids)] = ids
        arrays["instruction_mask"][turn, : len(ids)] = True
    frame = vision_frame(*size, model.vision.image_size, model.vision.image_fit)
    for turn, mask_ids in enumerate(rendered.prompted):
        if mask_ids:
            prompts = sample_prompts(
                [masks[mask_id] for mask_id in mask_ids], rng, model.prompt, name, config.prompt_kinds(), config.data.mixed_prompts
            )
            arrays["prompt_xy"][turn], arrays["prompt_kind"][turn] = encode_prompts(prompts, frame, model.prompt)
    target_cache = {} if target_cache is None else target_cache

    def merged_mask(mask_ids: Sequence[str], frame: Frame, side: int) -> np.ndarray:
        key = (*sorted(mask_ids), side)
        if key not in target_cache:
            merged = masks[mask_ids[0]]
            for mask_id in mask_ids[1:]:
                merged = merged | masks[mask_id]
            target_cache[key] = mask_to_frame(merged, frame, side)
        return target_cache[key]

    for slot, mask_ids in enumerate(rendered.seg_targets):
        arrays["masks"][slot] = merged_mask(mask_ids, sam_frame(*size, model.sam.image_size, model.sam.image_fit), config.target_side())
    for turn, mask_ids in enumerate(rendered.answer_masks):
        arrays["attention_target_mask"][turn] = mask_ids is not None
        if mask_ids:
            arrays["attention_target"][turn] = merged_mask(mask_ids, frame, model.vision.grid())
    arrays["seg_index"][:count] = rendered.seg_positions
    arrays["seg_mask"][:count] = True
    arrays["sample_weight"] = np.float32(1)
    return {
        **arrays,
        "input_ids": rendered.input_ids,
        "query_index": rendered.query_index,
        "loss_mask": rendered.loss_mask,
    }


def padding_sample(config: Config) -> dict[str, np.ndarray]:
    """A sample of weight 0 that replaces an unusable one. It has one token, so that attention has a key."""
    model, side = config.model, config.target_side()
    turns, slots, tokens = model.max_turns, model.max_segs, model.prompt.max_tokens
    return {
        "input_ids": np.zeros(1, np.int32),
        "query_index": np.full(1, -1, np.int32),
        "loss_mask": np.zeros(1, np.float32),
        "instruction_ids": np.zeros((turns, model.aligner.max_text), np.int32),
        "instruction_mask": np.zeros((turns, model.aligner.max_text), bool),
        "prompt_xy": np.zeros((turns, tokens, 2), np.float32),
        "prompt_kind": np.zeros((turns, tokens), np.int32),
        "attention_target": np.zeros((turns, model.vision.grid(), model.vision.grid()), np.uint8),
        "attention_target_mask": np.zeros(turns, bool),
        "seg_index": np.zeros(slots, np.int32),
        "seg_mask": np.zeros(slots, bool),
        "masks": np.zeros((slots, side, side), np.uint8),
        "sample_weight": np.float32(0),
    }


def padding_image(model: ModelConfig) -> dict[str, np.ndarray]:
    """The arrays of a black image, which replace those of an image that cannot be read."""
    return preprocess(np.zeros((1, 1, 3), np.uint8), model)


def needs_image(model: ModelConfig, features: Collection[str]) -> bool:
    """Whether a batch with these stored features also needs images: those of a vision tower whose X_img is not among them."""
    return not model.vision.from_sam() and "x_img" not in features


def feature_views(features: Mapping[str, np.ndarray], size: tuple[int, int], image: np.ndarray | None, model: ModelConfig) -> dict:
    """Stored features of an image of (height, width) = `size` in place of the arrays of `preprocess`. image: uint8 RGB [H, W, 3] if
    `needs_image`, else None."""
    views = {**features, **content_sizes(*size, model)}
    return views if image is None else views | {"vision_image": vision_image(image, model)}


def padding_features(features: Mapping[str, np.ndarray], model: ModelConfig) -> dict[str, np.ndarray]:
    """`padding_image` with stored features: zeros, by name."""
    image = np.zeros((1, 1, 3), np.uint8) if needs_image(model, features) else None
    return feature_views(features, (1, 1), image, model)


def sample_prompts(
    masks: Sequence[np.ndarray],
    rng: np.random.Generator,
    cfg: PromptConfig,
    name: str = "sample",
    kinds: Sequence[str] = PROMPT_KINDS,
    mixed: float = 0.0,
) -> Prompts:
    """The prompts of one turn, sampled on each of `masks` (bool [H, W]). The kind is one of `kinds` that leaves room for a box on each of
    the other masks, or a box if there is none. With the probability `mixed`, a mask gets more marks that are true of it, as far as there
    is room: one of another kind, points outside all masks, or both. Raises SampleError if not even boxes fit in P = cfg.max_tokens."""
    if 2 * len(masks) > cfg.max_tokens:
        raise SampleError(f"{name}: points at {len(masks)} masks in one turn; raise config.model.prompt.max_tokens ({cfg.max_tokens})")
    meant = np.logical_or.reduce(masks)
    sampled: list[Prompts] = []
    for number, mask in enumerate(masks):
        room = cfg.max_tokens - sum(p.tokens(cfg) for p in sampled) - 2 * (len(masks) - number - 1)
        prompts = draw_prompts(mask, rng, _fitting(kinds, room, cfg) or ["box"], meant)
        if mixed and rng.random() < mixed:
            prompts = _with_more_marks(prompts, mask, meant, rng, kinds, room, cfg)
        sampled.append(prompts)
    return joined(sampled)


def _with_more_marks(
    prompts: Prompts, mask: np.ndarray, meant: np.ndarray, rng: np.random.Generator, kinds: Sequence[str], room: int, cfg: PromptConfig
) -> Prompts:
    """`prompts` with a mark of another kind, one or two points outside `meant`, or both: at most `room` tokens in all."""
    choice = int(rng.integers(3))
    others = [kind for kind in _fitting(kinds, room - prompts.tokens(cfg), cfg) if kind not in prompts.kinds()]
    if choice != 1 and others:
        prompts = joined([prompts, draw_prompts(mask, rng, others, meant)])
    if choice != 0 and "point" in kinds:
        for _ in range(min(int(rng.integers(1, 3)), room - prompts.tokens(cfg))):
            prompts = joined([prompts, draw_outside(mask, rng, meant)])
    return prompts


def _fitting(kinds: Sequence[str], room: int, cfg: PromptConfig) -> list[str]:
    """Those of `kinds` that take at most `room` tokens."""
    tokens = {"point": _MAX_POINT_TOKENS, "box": 2, "scribble": cfg.scribble_points}
    return [kind for kind in kinds if tokens[kind] <= room]


def smallest_bucket(length: int, buckets: Sequence[int]) -> int:
    """The first of the ascending `buckets` that has room for `length` tokens."""
    for bucket in buckets:
        if length <= bucket:
            return bucket
    raise SampleError(f"{length} tokens; the largest of config.data.buckets is {buckets[-1]}")


def stack_batch(examples: Sequence[dict], bucket: int) -> dict[str, np.ndarray]:
    """N examples of K samples each -> a batch with T = `bucket`, in which sample b belongs to image b // K."""
    counts = {len(example["samples"]) for example in examples}
    if len(counts) != 1:
        raise ValueError(f"examples with {sorted(counts)} samples: every image of a batch must have the same number")
    samples = [sample for example in examples for sample in example["samples"]]
    batch = {key: np.stack([example[key] for example in examples]) for key in examples[0] if key != "samples"}
    along = {"input_ids": 0, "query_index": -1, "loss_mask": 0}  # padding value of the arrays with axis T
    for key, fill in along.items():
        batch[key] = np.full((len(samples), bucket), fill, samples[0][key].dtype)
        for row, sample in zip(batch[key], samples, strict=True):
            row[: len(sample[key])] = sample[key]
    lengths = np.array([len(sample["input_ids"]) for sample in samples])
    batch["token_mask"] = np.arange(bucket) < lengths[:, None]
    batch |= {key: np.stack([sample[key] for sample in samples]) for key in samples[0] if key not in along}
    return batch
