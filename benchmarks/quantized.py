"""Loss of quality by quantization: the same questions to one checkpoint, whose language model's weights are stored in several formats.

    python benchmarks/quantized.py --checkpoint runs/a --data data/phantom --limit 500

The report has mIoU over all structures of perspectives I to IV, and the fraction of answers whose text equals that of the unquantized model
with the same activations. "bfloat16": activations and all parameters in bf16, except SAM's positional encoding.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax.numpy as jnp  # noqa: E402

from mimo_jax import pathtree, quantize  # noqa: E402
from mimo_jax.checkpoints import loading
from mimo_jax.config import QUANTIZATIONS  # noqa: E402
from mimo_jax.data.loading.sources import open_source  # noqa: E402
from mimo_jax.data.tokenizer import load_tokenizer  # noqa: E402
from mimo_jax.eval.evaluate import evaluate  # noqa: E402
from mimo_jax.infer.predictor import Mimo  # noqa: E402
from mimo_jax.parameters import ALWAYS_FP32  # noqa: E402


class RecordingMimo(Mimo):
    """Records the text of every answer, in the order of the questions."""

    texts: list[str]

    def generate(self, requests):
        results = super().generate(requests)
        self.texts += [answer.text for answer, _ in results]
        return results


def quantized_model(loaded: loading.Loaded, dtype: str, weights: str) -> RecordingMimo:
    """The model with activations and parameters in `dtype`, and with the matrices of its language model quantized to `weights`."""
    config = loaded.config.with_quantization(weights)
    config.model.dtype = config.model.frozen_dtype = dtype
    params = {}
    for path, leaf in pathtree.flatten(loaded.params).items():
        for name, part in quantize.quantize_param(path, leaf, weights).items():
            wide = not jnp.issubdtype(part.dtype, jnp.floating) or name.endswith("kernel_scale") or re.search(ALWAYS_FP32, name)
            params[name] = part if wide else part.astype(dtype)
    mimo = RecordingMimo(config, pathtree.unflatten(params), load_tokenizer(loaded.tokenizer, config.model))
    mimo.texts = []
    return mimo


def miou(report: dict) -> float:
    rows = report["per_modality"].values()
    return sum(row["miou"] * row["n"] for row in rows) / sum(row["n"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=500)
    args = parser.parse_args()
    loaded = loading.load_for_inference(args.checkpoint)
    records = open_source(args.data, args.split)
    print("| activations | weights | LLM matrices, MB | mIoU | loss | closed VQA | texts equal | answers | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        for weights in ("", *QUANTIZATIONS):
            mimo, started = quantized_model(loaded, dtype, weights), time.monotonic()
            report = evaluate(mimo, records, args.limit)
            flat = pathtree.flatten(mimo.engine.params)
            size = sum(leaf.nbytes for path, leaf in flat.items() if re.search(r"^llm/.*/kernel", path)) / 2**20
            if not weights:
                reference_texts, best = mimo.texts, miou(report)
            same = sum(a == b for a, b in zip(reference_texts, mimo.texts, strict=True)) / len(reference_texts)
            numbers = f"{size:.2f} | {miou(report):.4f} | {best - miou(report):+.4f} | {report['vqa_closed_accuracy']:.4f} | {same:.4f}"
            print(f"| {dtype} | {weights or dtype} | {numbers} | {len(reference_texts)} | {time.monotonic() - started:.0f} |", flush=True)


if __name__ == "__main__":
    main()
