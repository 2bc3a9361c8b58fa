"""Inference of a whole model with random weights on the available device, compared with `transformers` in the same run.

    python benchmarks/gpu_infer.py                                    # mimo_7b on a GPU
    python benchmarks/gpu_infer.py --config configs/tiny.py --batches 1,8 --context 64 --new 16    # on a CPU, in a minute

Median tokens/s by batch in bf16 and int8, against the bandwidth limit (weights and cache read once per token) and against transformers'
`generate` with a model of the same sizes; images/s of the image encoders; seconds from pixels to the first mask.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mimo_jax import pathtree, quantize  # noqa: E402
from mimo_jax.config import Config  # noqa: E402
from mimo_jax.config_flags import load_config  # noqa: E402
from mimo_jax.data.transforms import preprocess  # noqa: E402
from mimo_jax.infer.engine.compiled import Engine  # noqa: E402
from mimo_jax.infer.engine.decode_batch import bucket, cache_bucket  # noqa: E402
from mimo_jax.models import mimo  # noqa: E402
from mimo_jax.parameters import with_dtypes  # noqa: E402

REPEATS = 5


def random_engine(config: Config, weights: str) -> Engine:
    """Parameters drawn on the device, small enough that nothing overflows; the language model's matrices are stored as `weights`."""
    leaves = {}
    for number, (path, leaf) in enumerate(pathtree.flatten(with_dtypes(config, mimo.abstract(config)[1])).items()):
        draw = jax.jit(lambda key, leaf=leaf: (0.02 * jax.random.normal(key, leaf.shape, jnp.bfloat16)).astype(leaf.dtype))
        leaves |= quantize.quantize_param(path, draw(jax.random.key(number)), weights)
    return Engine(config.with_quantization(weights), pathtree.unflatten(leaves), eos_id=-1)


def median_seconds(call: Callable[[], object]) -> float:
    jax.block_until_ready(call())
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def bandwidth() -> float:
    """Bytes/s at which a large array is read."""
    size = 2**30 if jax.default_backend() != "cpu" else 2**27
    x = jnp.ones(size // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return size / median_seconds(lambda: total(x))


class Answers:
    """Answers of `new` tokens to prompts of `context` tokens."""

    def __init__(self, engine: Engine, config: Config, batch: int, context: int, new: int):
        rng = np.random.default_rng(0)
        self.engine, self.config, self.batch, self.new = engine, config, batch, new
        self.ids = np.zeros((batch, bucket(context)), np.int32)
        self.ids[:, :context] = rng.integers(3, config.model.llm.vocab_size, (batch, context))
        self.lengths, self.slots = np.full(batch, context, np.int32), cache_bucket(context + new)
        self.x_q = jnp.zeros((batch, 1, config.model.query_tokens(), config.model.llm.width), config.model.dtype)

    def __call__(self, new: int | None = None):
        b, new = self.batch, self.new if new is None else new
        greedy = np.zeros(b, np.float32), np.ones(b, np.float32), np.zeros(b, np.uint32)
        cache, zero = self.engine.new_cache(b, self.slots), np.zeros(b, np.int32)
        limits = np.full(b, self.new, np.int32)
        state = self.engine.prefill(cache, self.x_q, self.ids, np.full_like(self.ids, -1), zero, self.lengths, limits, *greedy, self.new)
        return self.engine.decode(state, new)

    def rates(self) -> tuple[float, float]:
        """(tokens/s of whole answers, including prefill; seconds per decoding step)."""
        full, half = median_seconds(self), median_seconds(lambda: self(self.new // 2))
        return self.batch * self.new / full, (full - half) / (self.new - self.new // 2)

    def bytes_per_step(self) -> int:
        """Weights of the language model and head, and the keys and values of the context, each read once."""
        flat = pathtree.flatten(self.engine.params)
        weights = sum(leaf.nbytes for path, leaf in flat.items() if path.startswith(("llm/", "lm_head/")))
        llm, width = self.config.model.llm, jnp.dtype(self.config.model.dtype).itemsize
        return weights + 2 * llm.layers * self.batch * int(self.lengths[0]) * llm.kv_heads * llm.width // llm.heads * width


def transformers_generate(config: Config, batch: int, context: int, new: int) -> Callable[[], object]:
    """Greedy `generate` of transformers with its cache, for a Llama of the same sizes and dtype."""
    import torch
    import transformers

    llm, device = config.model.llm, "cuda" if torch.cuda.is_available() else "cpu"
    about = transformers.LlamaConfig(
        vocab_size=llm.vocab_size, hidden_size=llm.width, intermediate_size=llm.mlp_width, num_hidden_layers=llm.layers,
        num_attention_heads=llm.heads, num_key_value_heads=llm.kv_heads, max_position_embeddings=llm.max_length, eos_token_id=None,
    )  # fmt: skip
    with torch.device(device):
        torch.set_default_dtype(getattr(torch, config.model.dtype))
        model = transformers.LlamaForCausalLM(about).eval()
    ids = torch.randint(3, llm.vocab_size, (batch, context), device=device)

    def call():
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, use_cache=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def encode_images(engine: Engine, config: Config, count: int) -> Callable[[], tuple[jax.Array, jax.Array]]:
    """Both image encoders on `count` images."""
    side = config.model.sam.image_size
    views = preprocess(np.zeros((side, side, 3), np.uint8), config.model)
    views = {name: np.repeat(array[None], count, axis=0) for name, array in views.items()}
    return lambda: engine.encode(views, count)


def first_mask(engine: Engine, config: Config, context: int, new: int) -> Callable[[], object]:
    """Both image encoders, aligner, prefill, one token, and its mask."""
    m, answers, encode = config.model, Answers(engine, config, 1, context, new), encode_images(engine, config, 1)
    ids, mask = np.zeros((1, 1, m.aligner.max_text), np.int32), np.ones((1, 1, m.aligner.max_text), bool)
    xy, kind = np.zeros((1, 1, m.prompt.max_tokens, 2), np.float32), np.zeros((1, 1, m.prompt.max_tokens), np.int32)

    def call():
        x_img, features = encode()
        answers.x_q = engine.align(x_img, ids, mask, xy, kind)
        return engine.segment(features, answers(1).states, np.zeros((1, 1), np.int32), 1)

    return call


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="configs/mimo_7b.py")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--images", type=int, default=8, help="in a batch of the SAM encoder")
    args = parser.parse_args()
    config = load_config(["--config", args.config], {})
    device, speed = jax.devices()[0], bandwidth()
    print(f"{config.name}, {config.model.dtype}, {device.device_kind}, jax {jax.__version__}, reads {speed / 1e9:.0f} GB/s")
    print(f"prompts of {args.context} tokens, answers of {args.new}")
    for weights in ("", "int8"):
        engine = random_engine(config, weights)
        for batch in map(int, args.batches.split(",")):
            answers = Answers(engine, config, batch, args.context, args.new)
            rate, step = answers.rates()
            limit = answers.bytes_per_step() / speed
            print(
                f"{weights or config.model.frozen_dtype}, batch {batch}: {rate:.0f} tokens/s; step {1000 * step:.2f} ms, "
                f"bandwidth limit {1000 * limit:.2f} ms ({limit / step:.0%})",
                flush=True,
            )
        if not weights:
            taken = median_seconds(encode_images(engine, config, args.images))
            print(f"both image encoders, batch {args.images}: {args.images / taken:.1f} images/s")
            taken = median_seconds(first_mask(engine, config, args.context, args.new))
            print(f"from pixels to the first mask: {1000 * taken:.0f} ms", flush=True)
        del engine
    for batch in map(int, args.batches.split(",")):
        taken = median_seconds(transformers_generate(config, batch, args.context, args.new))
        print(f"transformers, batch {batch}: {batch * args.new / taken:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
