"""Parity of the towers at full width, two layers each, with the original libraries, in float32 with random weights.

    python benchmarks/parity_full_width.py

CLIP ViT-H (1280), Vicuna-7B (4096/11008; also with grouped queries), SAM ViT-H (1280 at 1024 x 1024, one windowed and one global
block), SAM's prompt encoder and mask decoder.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoints_convert import rows  # noqa: E402
from mimo_jax.model_config import ClipConfig, LlamaConfig, ModelConfig, SamVitConfig
from mimo_jax.models import scan  # noqa: E402
from mimo_jax.models.clip_vit import ClipVit  # noqa: E402
from mimo_jax.models.sam_decoder import MaskDecoder, SamPromptEncoder  # noqa: E402
from mimo_jax.models.sam_encoder import SamEncoder  # noqa: E402
from tests.checkpoints_convert import torch_models  # noqa: E402
from tests.models import oracles  # noqa: E402
from tests.models.test_llama import Language, convert  # noqa: E402

SAM = SamVitConfig(layers=2, global_every=2)
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def below(root: str) -> tuple:
    return tuple(row for row in rows.SAM if row.path.startswith(root))


def run(graphdef, params, *arguments) -> np.ndarray:
    return jax.jit(lambda p, *args: scan.bind(graphdef, p)(*args))(params, *arguments)


def clip(activation: str) -> float:
    cfg = ClipConfig(layers=2, feature_layer=-1, class_token=True, activation=activation)
    oracle, x = oracles.randomised(torch_models.clip_model(cfg)), normal(1, 224, 224, 3)
    wanted = oracle(torch.from_numpy(x).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states[-1]
    return oracles.relative_l2(
        run(*oracles.brought_here(oracle, lambda r: ClipVit(cfg, rngs=r), "vision", rows.CLIP, ModelConfig(vision=cfg)), x), wanted
    )


def llama(kv_heads: int) -> float:
    cfg = LlamaConfig(layers=2, kv_heads=kv_heads)
    oracle = oracles.randomised(torch_models.llama_model(cfg, cfg.vocab_size + 3))
    graphdef, shapes = scan.abstract(lambda rngs: Language(cfg, rngs=rngs))
    params = convert(oracle, cfg, shapes)
    ids = RNG.integers(0, cfg.vocab_size + 3, (1, 64))
    return oracles.relative_l2(run(graphdef, params, jnp.asarray(ids), jnp.arange(64)[None]), oracle(torch.tensor(ids)).logits)


def sam_encoder(oracle: torch.nn.Module) -> float:
    x = normal(1, 1024, 1024, 3)
    wanted = oracle.image_encoder(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    make = lambda r: SamEncoder(SAM, rngs=r)  # noqa: E731
    table = below("sam_encoder/")
    converted = oracles.brought_here(oracle.image_encoder, make, "sam_encoder", table, ModelConfig(sam=SAM), prefix="image_encoder.")
    return oracles.relative_l2(run(*converted, x), wanted)


def sam_prompts(oracle: torch.nn.Module) -> tuple[float, float]:
    """Relative L2 of the sparse embeddings of points and a box, and of the masks decoded from them."""
    xy, labels, boxes = (
        RNG.uniform(0, 1023, (1, 3, 2)).astype(np.float32),
        np.array([[1, 0, 1]]),
        np.array([[100.0, 80.0, 700.0, 900.0]], np.float32),
    )
    features = normal(1, 64, 64, 256)
    sparse, dense = oracle.prompt_encoder((torch.from_numpy(xy), torch.from_numpy(labels)), torch.from_numpy(boxes), None)
    wanted, _ = oracle.mask_decoder(
        torch.from_numpy(features).permute(0, 3, 1, 2), oracle.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=True
    )
    cfg = ModelConfig(sam=SAM)
    prompt_make, decoder_make = (lambda r: SamPromptEncoder(SAM, rngs=r)), (lambda r: MaskDecoder(SAM, rngs=r))
    prompt = scan.bind(
        *oracles.brought_here(oracle.prompt_encoder, prompt_make, "sam_prompt", below("sam_prompt/"), cfg, prefix="prompt_encoder.")
    )
    decoder = scan.bind(
        *oracles.brought_here(oracle.mask_decoder, decoder_make, "sam_decoder", below("sam_decoder/"), cfg, prefix="mask_decoder.")
    )
    ours, no_mask = prompt((jnp.asarray(xy + 0.5), jnp.asarray(labels)), jnp.asarray(boxes + 0.5))
    masks, _ = decoder(jnp.asarray(features), prompt.dense_pe(), ours[:, None], no_mask, multimask=True)
    return oracles.relative_l2(ours, sparse), oracles.relative_l2(masks[:, 0], wanted)


def main() -> None:
    with torch.no_grad():
        for activation in ("gelu", "quick_gelu"):
            print(f"CLIP 1280, {activation}: {clip(activation):.2e}", flush=True)
        for kv_heads in (32, 8):
            print(f"Llama 4096/11008, {kv_heads} key-value heads: {llama(kv_heads):.2e}", flush=True)
        oracle = oracles.randomised(torch_models.sam_model(dataclasses.replace(SAM)))
        print(f"SAM encoder 1280 at 1024 x 1024, a windowed and a global block: {sam_encoder(oracle):.2e}", flush=True)
        sparse, masks = sam_prompts(oracle)
        print(f"SAM prompt encoder: {sparse:.2e}; mask decoder: {masks:.2e}")


if __name__ == "__main__":
    main()
