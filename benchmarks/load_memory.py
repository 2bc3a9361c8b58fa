"""Peak memory while a model is loaded for inference, in bf16, int8 and int4.

    python benchmarks/load_memory.py [--layers 24] [--width 1536]

Writes a run of random bf16 weights, most of them in the language model, to a temporary folder, and loads it in a separate process
for each format. Run it on a CPU, where the model's memory is that of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from mimo_jax import files, pathtree  # noqa: E402
from mimo_jax.checkpoints import checkpoint, frozen_params, loading
from mimo_jax.config import QUANTIZATIONS
from mimo_jax.model_config import LlamaConfig
from mimo_jax.models import mimo  # noqa: E402
from tests.tiny_config import tiny_config  # noqa: E402

MB = 2**20


def write(run: Path, layers: int, width: int) -> None:
    config = tiny_config(llm=LlamaConfig(vocab_size=512, width=width, layers=layers, heads=12, kv_heads=12, mlp_width=8 * width // 3))
    rng = np.random.default_rng(0)

    def leaves():
        for path, leaf in pathtree.flatten(mimo.abstract(config)[1]).items():
            yield path, (rng.standard_normal(leaf.shape, np.float32) * 0.02).astype("bfloat16")

    frozen_params.write(run, leaves())
    checkpoint.write_step(run, 0, iter(()), {})
    files.write_json(run / "config.json", config.to_dict())
    (run / "tokenizer.json").write_text("{}")


def load(run: Path, weights: str) -> dict[str, float]:
    """MB of this process before loading, MB of the parameters, peak MB of this process."""
    import jax

    jax.devices()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    params = loading.load_for_inference(run, quantization=weights).params
    parameter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {"before": before / MB, "parameters": parameter_bytes / MB, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--load", nargs=2, metavar=("RUN", "QUANTIZATIONS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(Path(args.load[0]), args.load[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.layers, args.width)
        largest = max(leaf.size for leaf in loading.LazyParams(folder).shapes.values()) * 2 / MB
        print(f"the largest parameter has {largest:.0f} MB on disk\n")
        print("| weights | parameters, MB | peak above the empty process, MB |\n|---|---|---|")
        for weights in ("", *QUANTIZATIONS):
            done = subprocess.run([sys.executable, __file__, "--load", folder, weights], check=True, capture_output=True, text=True)
            measured = json.loads(done.stdout)
            print(f"| {weights or 'bf16'} | {measured['parameters']:.0f} | {measured['peak'] - measured['before']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
