"""The optimizer."""

from __future__ import annotations

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mimo_jax import pathtree
from mimo_jax.config import TrainConfig
from mimo_jax.models import scan

# Ordered path regex -> whether weight decay applies: to what a vector is multiplied with, as is common practice, and not to biases, scales
# of norms, embeddings, positions and learnt tokens, even where layers are stacked to arrays of more axes.
DECAYED: dict[str, bool] = {
    r"/(kernel|lora_[ab])$": True,
    r"^lm_head/": True,
    r"": False,
}


def schedule(cfg: TrainConfig) -> optax.Schedule:
    """Linear warm-up, then linear decay to `final_learning_rate` at the last step."""
    warmup = min(cfg.warmup_steps, cfg.steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, cfg.learning_rate, max(warmup, 1)),
            optax.linear_schedule(cfg.learning_rate, cfg.final_learning_rate, max(cfg.steps - warmup, 1)),
        ],
        [warmup],
    )


def make_optimizer(cfg: TrainConfig, table: dict[str, float | None]) -> optax.GradientTransformation:
    """Clipping by global norm, Adam or Muon, decoupled weight decay (DECAYED), the schedule, and each path's multiplier."""

    def scale_by_path(updates, _params=None):
        flat = pathtree.flatten(updates)
        return pathtree.unflatten({path: u * table[path] for path, u in flat.items()})

    def decayed(params):
        return pathtree.unflatten({path: pathtree.first_match(path, DECAYED, "DECAYED") for path in pathtree.flatten(params)})

    adam = optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2)
    return optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm),
        adam if cfg.optimizer == "adam" else optax.partition({"muon": _muon(), "adam": adam}, _muon_or_adam),
        optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(schedule(cfg)),
        optax.stateless(scale_by_path),
    )


def _muon_or_adam(params: dict) -> dict:
    """Which of the two optimizes each parameter. Muon orthogonalises the matrices inside the towers: the last two axes of a kernel, layer
    by layer where layers are stacked, and head by head where a kernel has one matrix for each. Convolutions, whose kernels have four axes
    without those of the stack, embeddings, the language head and LoRA's thin factors are Adam's."""

    def label(path: str, leaf: jax.Array) -> str:
        return "muon" if path.endswith("/kernel") and leaf.ndim - scan.num_stack_axes(path) < 4 else "adam"

    return pathtree.unflatten({path: label(path, leaf) for path, leaf in pathtree.flatten(params).items()})


def _muon() -> optax.GradientTransformation:
    """Orthogonalised momentum (Jordan et al. 2024), scaled so that the entries of an update are as large as Adam's: the same
    learning rate suits both (Liu et al. 2025, "Muon is scalable", section 2.2)."""

    def axes(params):
        return jax.tree.map(lambda p: MuonDimensionNumbers(reduction_axis=p.ndim - 2, output_axis=p.ndim - 1), params)

    def like_adam(updates, _params=None):
        return jax.tree.map(lambda u: u * 0.2 * max(u.shape[-2:]) ** 0.5, updates)

    return optax.chain(scale_by_muon(weight_dimension_numbers=axes), optax.stateless(like_adam))
