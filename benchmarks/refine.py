"""Effect on mIoU of giving SAM's decoder its first mask (refine) and the user's points and boxes (sam_prompts).

python benchmarks/refine.py --checkpoint runs/demo/run --data runs/demo/phantom --limit 800
"""

from __future__ import annotations

import argparse

from mimo_jax.data.loading.sources import open_source
from mimo_jax.eval.evaluate import collect_results
from mimo_jax.eval.report import make_report
from mimo_jax.eval.selection import select_samples
from mimo_jax.eval.standard_metrics import GROUNDED
from mimo_jax.infer.predictor import Mimo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    mimo = Mimo.load(args.checkpoint)
    records = open_source(args.data, args.split)
    chosen = select_samples(records, args.limit, GROUNDED)
    print(mimo.origin)
    print(f"{'mIoU':24}" + "".join(f"{p:>10}" for p in GROUNDED))
    for refine in (False, True):
        for sam_prompts in (False, True):
            mimo.config.generate.refine, mimo.config.generate.sam_prompts = refine, sam_prompts
            report = make_report(collect_results(mimo, records, chosen))
            name = " + ".join(["refine"] * refine + ["sam_prompts"] * sam_prompts) or "neither"
            print(
                f"{name:24}" + "".join(f"{'-' if value is None else f'{value:.4f}':>10}" for value in report["miou"].values()), flush=True
            )
    print(f"{'entities':24}" + "".join(f"{count:>10}" for count in report["n"]["entities"].values()))


if __name__ == "__main__":
    main()
