"""Greedy generation on a CPU against `transformers` with the same weights, in one run.

    python benchmarks/generate.py [tiny] [larger]

transformers makes a Llama with random weights (float32), which is converted by the name table. The report says whether the tokens are the
same, and has tokens per second at batch 1 and 16 and without a cache. Prompts have mixed lengths; torch uses one thread per core.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoints_convert import name_map, rows  # noqa: E402
from configs import tiny  # noqa: E402
from mimo_jax import pathtree  # noqa: E402
from mimo_jax.infer.engine.compiled import Engine  # noqa: E402
from mimo_jax.infer.engine.decode_batch import bucket, cache_bucket  # noqa: E402
from mimo_jax.model_config import LlamaConfig
from mimo_jax.models import mimo, scan  # noqa: E402
from tests.tiny_config import random_params, tiny_config  # noqa: E402

SIZES = {
    "tiny": dataclasses.replace(tiny.get_config().model.llm, max_length=1024),
    "larger": LlamaConfig(vocab_size=8000, width=768, layers=12, heads=12, kv_heads=4, mlp_width=2048, max_length=1024),
}
PROMPTS, SINGLE, LONGEST, NEW, REPEATS = 64, 16, 256, 32, 3  # SINGLE of the prompts are timed one by one
CONTEXT = 512  # prompt length of the comparison without a cache


def language_model(llm: LlamaConfig) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=llm.vocab_size + 3, hidden_size=llm.width, intermediate_size=llm.mlp_width, num_hidden_layers=llm.layers,
        num_attention_heads=llm.heads, num_key_value_heads=llm.kv_heads, rms_norm_eps=llm.eps, max_position_embeddings=llm.max_length,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.05,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def converted_model(model: transformers.LlamaForCausalLM, llm: LlamaConfig):
    """(config, parameters) of a MIMO model with the same language model; its other parts are tiny and not used."""
    config = tiny_config()
    config.model.llm = llm
    params = pathtree.flatten(random_params(config))
    leaves = {path: leaf for path, leaf in params.items() if path.split("/")[0] in ("llm", "embedding", "lm_head")}
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    imported = name_map.import_state(tensors, rows.LLAMA, name_map.layer_indices(config.model), leaves, rows.LLAMA_IGNORED)
    return config, pathtree.unflatten(params | imported)


def ours(engine: Engine, config, prompts: list[np.ndarray], new: int) -> np.ndarray:
    """ids [B, new], in the shapes that `infer/engine/decode_batch.py` would choose."""
    b, longest = len(prompts), max(map(len, prompts))
    length = bucket(longest)
    ids, lengths = np.zeros((b, length), np.int32), np.array([*map(len, prompts)], np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    x_q = np.zeros((b, 1, config.model.query_tokens(), config.model.llm.width), np.float32)
    greedy = np.zeros(b, np.float32), np.ones(b, np.float32), np.zeros(b, np.uint32)
    cache = engine.new_cache(b, cache_bucket(longest + new))
    nothing, limits = np.zeros(b, np.int32), np.full(b, new, np.int32)
    state = engine.prefill(cache, x_q, ids, np.full_like(ids, -1), nothing, lengths, limits, *greedy, new)
    return np.asarray(engine.decode(state, new).ids)


@torch.no_grad()
def theirs(model: transformers.LlamaForCausalLM, prompts: list[np.ndarray], new: int) -> np.ndarray:
    """ids [B, new], by `generate` with its cache; left-padded to the longest."""
    longest = max(map(len, prompts))
    ids, mask = torch.zeros((len(prompts), longest), dtype=torch.long), torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.from_numpy(prompt), 1
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, use_cache=True)
    return out[:, longest:].numpy()


def batches(prompts: list[np.ndarray], size: int) -> list[list[np.ndarray]]:
    return [prompts[at : at + size] for at in range(0, len(prompts), size)]


def median_seconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each call; the calls alternate."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())  # compiles, or warms up
    for _ in range(REPEATS):
        for name, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def without_cache(config, params, prompt: np.ndarray, new: int) -> Callable[[], object]:
    """The whole sequence through the model for every token, as LISA and GLaMM decode."""
    graphdef, _ = mimo.abstract(config)
    length = len(prompt) + new

    @jax.jit
    def step(params, ids, at):
        model = scan.bind(graphdef, params)
        hidden = model.decode(model.embedding(ids), jax.numpy.arange(length)[None])
        token = model.logits(hidden[:, at])[0].argmax().astype(jax.numpy.int32)
        return ids.at[0, at + 1].set(token)

    def call():
        ids = jax.numpy.asarray(np.pad(prompt, (0, new))[None].astype(np.int32))
        for at in range(len(prompt) - 1, length - 1):
            ids = step(params, ids, at)
        return ids[0, len(prompt) :]

    return call


def main() -> None:
    transformers.logging.set_verbosity_error()
    threads = torch.get_num_threads()
    print(f"float32; torch {torch.__version__} on {threads} threads, transformers {transformers.__version__}, jax {jax.__version__}")
    for name in sys.argv[1:] or SIZES:
        compare(name, SIZES[name])


def compare(name: str, llm: LlamaConfig) -> None:
    model = language_model(llm)
    config, params = converted_model(model, llm)
    engine = Engine(config, params, eos_id=-1)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, llm.vocab_size, rng.integers(8, LONGEST)) for _ in range(PROMPTS)]
    ordered = sorted(prompts, key=len)  # as `Mimo.generate` puts them into batches
    print(f"\n{name}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters:", flush=True)

    wanted = [theirs(model, [prompt], NEW)[0] for prompt in ordered]
    for batch in (1, 16):
        found = [row for group in batches(ordered, batch) for row in ours(engine, config, group, NEW)]
        same = sum(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
        print(f"greedy, {NEW} tokens, batch {batch}: identical to transformers in {same} of {PROMPTS}", flush=True)
    for batch, count in ((1, SINGLE), (16, PROMPTS)):
        some = ordered[:: PROMPTS // count]
        calls = {
            "ours": lambda some=some, batch=batch: [ours(engine, config, group, NEW) for group in batches(some, batch)],
            "transformers": lambda some=some, batch=batch: [theirs(model, group, NEW) for group in batches(some, batch)],
        }
        if batch > 1:
            calls["transformers, unsorted"] = lambda batch=batch: [theirs(model, group, NEW) for group in batches(prompts, batch)]
        taken = median_seconds(calls)
        best = min(taken[name] for name in taken if name != "ours")
        rates = ", ".join(f"{name} {count * NEW / value:.1f}" for name, value in taken.items())
        print(
            f"tokens/s, batch {batch}, {count} prompts of 8 to {LONGEST - 1} tokens: {rates}; ratio {best / taken['ours']:.2f}", flush=True
        )
    prompt = rng.integers(3, llm.vocab_size, CONTEXT)
    taken = median_seconds(
        {
            "short": lambda: ours(engine, config, [prompt], 8),
            "long": lambda: ours(engine, config, [prompt], 40),
            "uncached": without_cache(config, params, prompt, 8),
        }
    )
    cached, uncached = (taken["long"] - taken["short"]) / 32, taken["uncached"] / 8
    print(
        f"one token at a context of {CONTEXT}: {1000 * cached:.1f} ms with the cache, {1000 * uncached:.1f} ms without, "
        f"{uncached / cached:.1f} x"
    )


if __name__ == "__main__":
    main()
