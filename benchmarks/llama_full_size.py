"""The full-size language model in bf16 on a CPU, against a float32 reference and against torch in bf16.

    mimo convert roundtrip --config configs/mimo_7b.py --workdir /scratch/roundtrip
    python benchmarks/llama_full_size.py /scratch/roundtrip

Reads the Llama of the round trip, 13.5 GB of random bf16 weights. The reference and torch are computed layer by layer with
transformers' LlamaDecoderLayer; ours is computed from the converted checkpoint. Each runs in a separate process.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TOKENS = 128


def ids(vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, vocabulary, TOKENS)


def torch_logits(folder: Path, dtype: str) -> np.ndarray:
    """Logits float32 [T, V] of the original, with one layer in memory at a time."""
    import torch
    import transformers
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

    from checkpoints_convert.readers import open_tensors

    tensors = open_tensors(folder / "sources" / "llm")
    kind = getattr(torch, dtype)

    def get(key: str) -> torch.Tensor:
        return torch.from_numpy(np.array(tensors[key]).view(np.int16)).view(torch.bfloat16).to(kind)

    about = json.loads((folder / "sources" / "llm" / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": about.pop("rope_theta")}
    config = transformers.LlamaConfig(**about, vocab_size=len(tensors["lm_head.weight"]), rope_parameters=rope)
    config._attn_implementation = "sdpa"
    with torch.no_grad():
        x = torch.nn.functional.embedding(torch.from_numpy(ids(config.vocab_size)), get("model.embed_tokens.weight"))[None]
        positions = torch.arange(TOKENS)[None]
        code = LlamaRotaryEmbedding(config)(x, positions)
        for i in range(config.num_hidden_layers):
            with torch.device("meta"):
                layer = LlamaDecoderLayer(config, i)
            names = layer.state_dict().keys()
            layer.load_state_dict({name: get(f"model.layers.{i}.{name}") for name in names}, assign=True)
            x = layer(x, position_ids=positions, position_embeddings=code, attention_mask=None)
            x = x[0] if isinstance(x, tuple) else x
        norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        norm.weight = torch.nn.Parameter(get("model.norm.weight"))
        return (norm(x) @ get("lm_head.weight").T)[0].float().numpy()


def our_logits(folder: Path) -> np.ndarray:
    """Logits float32 [T, V] of the converted checkpoint, base vocabulary alone."""
    import jax
    import jax.numpy as jnp

    from mimo_jax import pathtree
    from mimo_jax.checkpoints import checkpoint, loading
    from mimo_jax.infer.engine.compiled import compiler_options
    from mimo_jax.models import mimo, scan

    run = folder / "import"
    config = checkpoint.read_config(run)
    config.model.lora.rank = 0
    roots = ("llm/", "embedding/", "lm_head/")
    graphdef, shapes = mimo.abstract(config)
    leaves = loading.LazyParams(run)
    flat = {path: jnp.asarray(leaves[path]) for path in leaves if path.startswith(roots) and "/lora_" not in path}
    positions = jnp.arange(TOKENS)[None]

    def forward(params, tokens):
        part = {path: params.get(path, leaf) for path, leaf in pathtree.flatten(shapes).items()}
        model = scan.bind(graphdef, pathtree.unflatten(part))
        return model.logits(model.decode(model.embedding(tokens), positions))[0]

    found = jax.jit(forward, compiler_options=compiler_options(config))(flat, jnp.asarray(ids(config.model.llm.vocab_size))[None])
    return np.asarray(found)[:, : config.model.llm.vocab_size]


def measured(folder: Path, which: str, scratch: Path) -> tuple[np.ndarray, dict]:
    """(logits, {seconds, peak RSS in GiB}) of one of the three, measured in a separate process."""
    subprocess.run([sys.executable, __file__, str(folder), which, str(scratch)], check=True)
    return np.load(scratch / f"{which}.npy"), json.loads((scratch / f"{which}.json").read_text())


def main() -> None:
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        which, scratch = sys.argv[2], Path(sys.argv[3])
        started = time.monotonic()
        logits = our_logits(folder) if which == "ours" else torch_logits(folder, which)
        np.save(scratch / f"{which}.npy", logits)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        (scratch / f"{which}.json").write_text(json.dumps({"s": round(time.monotonic() - started, 1), "peak_rss_gib": round(peak, 2)}))
        return
    with tempfile.TemporaryDirectory() as name:
        reference, about = measured(folder, "float32", Path(name))
        print(f"float32 reference: {about}")
        error, top = {}, np.sort(reference, axis=1)
        for which in ("bfloat16", "ours"):
            logits, about = measured(folder, which, Path(name))
            error[which] = np.linalg.norm(logits.astype(np.float64) - reference) / np.linalg.norm(reference)
            gap = top[:, -1] - top[:, -2]
            clear = gap > 4 * np.abs(logits - reference).max(axis=1)
            same = logits.argmax(1) == reference.argmax(1)
            print(
                f"{which}: relative L2 {error[which]:.3e}, argmax equal at {same.mean():.3f} of the tokens, at {same[clear].sum()} of the "
                f"{clear.sum()} whose top-2 gap exceeds 4 x the error; {about}"
            )
        print(f"ours / torch bf16: {error['ours'] / error['bfloat16']:.3f}")


if __name__ == "__main__":
    main()
