"""A model of a few thousand parameters that walks every code path, and batches for it; for tests."""

import numpy as np

from mimo_jax import pathtree
from mimo_jax.config import Config, DataConfig, GenerateConfig, TrainConfig
from mimo_jax.model_config import AlignerConfig, ClipConfig, LlamaConfig, LoraConfig, ModelConfig, PromptConfig, SamVitConfig
from mimo_jax.models import mimo


def tiny_config(**model) -> Config:
    """Two layers of everything, widths of 16 to 32; keyword arguments replace fields of `config.model`."""
    fields = {
        "vision": ClipConfig(image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_width=32, feature_layer=-1),
        "prompt": PromptConfig(width=16, max_tokens=12, scribble_points=4),
        "aligner": AlignerConfig(queries=4, blocks=2, width=16, heads=2, max_text=16),
        "llm": LlamaConfig(vocab_size=512, width=16, layers=2, heads=2, kv_heads=1, mlp_width=32, max_length=256),
        "lora": LoraConfig(rank=0),
        "sam": SamVitConfig(
            image_size=64, patch_size=8, width=16, layers=2, heads=2, window=4, global_every=2, decoder_width=32, decoder_heads=2,
            decoder_mlp_width=32, iou_head_width=16,
        ),
        "max_turns": 1,
        "max_segs": 3,
        "dtype": "float32",
        "frozen_dtype": "float32",
        "remat": "none",
    }  # fmt: skip
    return Config(
        name="test",
        model=ModelConfig(**(fields | model)),
        data=DataConfig(batch_size=4, samples_per_image=2, buckets="96,192", system_prompt="", seed=3),
        train=TrainConfig(
            steps=4, learning_rate=1e-3, warmup_steps=1, log_every=1, checkpoint_every=2, eval_samples=0, calibrate_samples=0
        ),
        generate=GenerateConfig(max_new_tokens=12, batch_size=4),
        trainables={r"^sam_prompt/": None, r".": 1.0},
        tokenizer="train",
    )


def frozen_config(**model) -> Config:
    """`tiny_config` with frozen image encoders, whose features can be stored."""
    config = tiny_config(**model)
    config.freeze = "^(vision|sam_encoder)/"
    return config


def quick_config() -> Config:
    """`frozen_config` with less of what takes long to compile, a quarter in all."""
    config = frozen_config(aligner=AlignerConfig(kind="linear"))
    config.model.sam.decoder_layers = 1
    return config


def random_batch(config: Config, seed: int = 0, length: int = 40) -> dict[str, np.ndarray]:
    """Arrays of the shapes and kinds that the loader makes, with random content."""
    m, rng = config.model, np.random.default_rng(seed)
    b, n = config.data.batch_size, config.data.batch_size // config.data.samples_per_image
    r, q = m.max_turns, m.query_tokens()
    query_index = np.full((b, length), -1, np.int32)
    query_index[:, 2 : 2 + q] = np.arange(q)
    ids = rng.integers(3, m.llm.vocab_size, (b, length)).astype(np.int32)
    seg_index = np.sort(rng.choice(np.arange(length - 8, length - 1), (b, m.max_segs)), axis=1).astype(np.int32)
    np.put_along_axis(ids, seg_index, m.llm.vocab_size + len(m.grounding_tokens()) - 1, axis=1)  # <SEG>
    ids[query_index >= 0] = 0
    loss_mask = np.zeros((b, length), np.float32)
    loss_mask[:, length - 10 :] = 1
    return {
        "vision_image": rng.integers(0, 256, (n, m.vision.image_size, m.vision.image_size, 3)).astype(np.uint8),
        "vision_size": np.full((n, 2), m.vision.image_size, np.int32),
        "sam_image": rng.integers(0, 256, (n, m.sam.image_size, m.sam.image_size, 3)).astype(np.uint8),
        "sam_size": np.full((n, 2), m.sam.image_size, np.int32),
        "input_ids": ids,
        "query_index": query_index,
        "token_mask": np.ones((b, length), bool),
        "loss_mask": loss_mask,
        "instruction_ids": rng.integers(3, m.llm.vocab_size, (b, r, m.aligner.max_text)).astype(np.int32),
        "instruction_mask": np.ones((b, r, m.aligner.max_text), bool),
        "prompt_xy": rng.uniform(0, m.vision.image_size - 1, (b, r, m.prompt.max_tokens, 2)).astype(np.float32),
        "prompt_kind": rng.integers(0, 6, (b, r, m.prompt.max_tokens)).astype(np.int32),
        "attention_target": rng.integers(0, 2, (b, r, m.vision.grid(), m.vision.grid())).astype(np.uint8),
        "attention_target_mask": np.ones((b, r), bool),
        "seg_index": seg_index,
        "seg_mask": np.broadcast_to(np.arange(m.max_segs) < 2, (b, m.max_segs)).copy(),
        "masks": rng.integers(0, 2, (b, m.max_segs, m.mask_side(), m.mask_side())).astype(np.uint8),
        "sample_weight": np.ones((b,), np.float32),
    }


def random_params(config: Config, seed: int = 0) -> dict:
    """All parameters, normal with a spread of 0.3 around 1 (scales) or 0: drawn on the host, in a moment, where the model's
    own initial values do not matter."""
    rng = np.random.default_rng(seed)
    _, shapes = mimo.abstract(config)
    flat = pathtree.flatten(shapes)
    return pathtree.unflatten(
        {path: (path.endswith("scale") + 0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype) for path, leaf in flat.items()}
    )


def painting_params(config: Config) -> dict:
    """`random_params`, but every token that is generated is a `<SEG>`: the words' states are one vector, and its row the likeliest."""
    flat = pathtree.flatten(random_params(config))
    for path in flat:
        if path.startswith("lm_head/") or (path.startswith("llm/") and path.endswith(("/o/kernel", "/down/kernel"))):
            flat[path] = np.zeros_like(flat[path])
        elif path.startswith("embedding/") or path == "llm/norm/scale":
            flat[path] = np.ones_like(flat[path])
    flat["lm_head/grounding"][:, -1] = 1
    return pathtree.unflatten(flat)
