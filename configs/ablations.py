"""Ablations of MIMO's parts, those of the paper and others, as data for `mimo sweep`.

    mimo sweep --config configs/ablations.py --data data/phantom --workdir runs/ablations --only aligner --seeds 0,1,2
    mimo sweep --config configs/ablations.py --base-config configs/mimo_7b.py --init IMPORT --data DIR --workdir DIR --dry-run

A group is a question, and its variants are the alternatives: overrides of the base config, each by its path. Overrides that equal the
base's value are dropped, so a variant without any change is the base itself, which runs once for all groups.
"""

import dataclasses
from typing import Any

from mimo_jax.config import PERSPECTIVES, Config

BASE = "configs/tiny.py"


def get_ablations(base: Config) -> dict[str, dict[str, dict[str, Any]]]:
    """group -> variant -> overrides. Sizes follow those of `base`."""
    q, rank, side = base.model.aligner.queries, base.model.lora.rank or 8, base.model.mask_side()
    no_map_loss = {"train.loss.attention_map": 0.0}
    return {
        # From the paper. Without queries there is no attention map, so the aligner is also trained without that loss.
        "aligner": {
            "cross_attention": _aligner(base, kind="cross_attention"),
            **({"cross_attention_no_map_loss": no_map_loss} if base.train.loss.attention_map else {}),
            "none": no_map_loss | _aligner(base, kind="none"),
        },
        "data": {"100": {"data.fraction": 1.0}} | {str(percent): {"data.fraction": percent / 100} for percent in (75, 50, 25)},
        "perspective": {f"without_{p}": {f"data.weights.{p}": 0.0} for p in PERSPECTIVES if base.data.weights.get(p)},
        # Not in the paper.
        "queries": {str(n): _aligner(base, queries=n) for n in (max(1, q // 4), max(1, q // 2), q, 2 * q)},
        "lora_rank": {str(r): _lora(base, r, base.model.lora.targets) for r in (rank // 2, rank, 2 * rank, 8 * rank)},
        "lora_targets": {t.replace(",", ""): _lora(base, rank, t) for t in ("q,v", "q,k,v,o", "q,k,v,o,gate,up,down")},
        "seg_state": {state: {"model.seg_state": state} for state in ("token", "predict")},
        "seg_position": {place: {"model.seg_position": place, **_fresh(base, r"/grounding$")} for place in ("inside", "after", "bare")},
        "prompts": {k.replace(",", "_"): {"data.prompt_kinds": k} for k in ("point,box,scribble", "point,box", "point", "box", "scribble")},
        "mask_side": {str(n): {"train.loss.mask_side": n} for n in (side // 2, side, 2 * side)},
        "vision_fit": {
            "pad": {"model.vision.image_fit": "pad"},
            "stretch": {"model.vision.image_fit": "stretch"},
            "crop": no_map_loss | {"model.vision.image_fit": "crop"},  # patches of a crop cannot be compared with masks of the whole image
        },
        "sam_fit": {fit: {"model.sam.image_fit": fit} for fit in ("pad", "stretch")},
        "decoder": {"trained": {}, "frozen": {"freeze": r"^sam_decoder/"}},
    }


def _aligner(base: Config, **fields: Any) -> dict[str, Any]:
    """Overrides for another aligner, with sequence lengths that follow the length of X_q."""
    model = dataclasses.replace(base.model, aligner=dataclasses.replace(base.model.aligner, **fields))
    more = base.model.max_turns * (model.query_tokens() - base.model.query_tokens())
    buckets = [length + more for length in base.buckets()]
    return {
        **{f"model.aligner.{name}": value for name, value in fields.items()},
        "data.buckets": ",".join(map(str, buckets)),
        "model.llm.max_length": max(base.model.llm.max_length, *buckets),
        **_fresh(base, "^aligner/"),
    }


def _lora(base: Config, rank: int, targets: str) -> dict[str, Any]:
    return {"model.lora.rank": rank, "model.lora.targets": targets, **_fresh(base, r"/lora_[ab]$")}


def _fresh(base: Config, group: str) -> dict[str, Any]:
    """Overrides that initialise parameters from the seed, because `--init` of the base may have them in another shape."""
    if not base.init.path or group in base.init.reinit.split("|"):
        return {}
    return {"init.reinit": "|".join(filter(None, [base.init.reinit, group]))}
