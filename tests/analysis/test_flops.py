"""The formula against the published budget, against the products that the traced model holds, and against XLA's own count."""

import math

import jax
import jax.numpy as jnp
import pytest

from configs import lisa_7b, mimo_7b, tiny, tiny_lora
from mimo_jax import parameters, pathtree
from mimo_jax.analysis import flops
from mimo_jax.models import mimo, scan
from tests.tiny_config import random_batch, tiny_config

TERA = 1e12


def big(image_size: int):
    """ViT-H/14 at its last layer, which the budget counts; the config's features are of the one before."""
    config = mimo_7b.get_config()
    config.model.vision.image_size, config.model.vision.feature_layer = image_size, -1
    return config


@pytest.mark.parametrize(
    ("image_size", "length", "clip", "llm", "llm_step", "total"),
    [(224, 512, 0.335, 6.83, 13.74, 20.1), (336, 800, 0.783, 10.74, 21.65, 28.5)],
)
def test_the_budget_of_one_sample(image_size, length, clip, llm, llm_step, total):
    once, step = flops.forward(big(image_size), length), flops.step(big(image_size), length)
    assert once["sam_encoder"] / TERA == pytest.approx(5.98, rel=5e-3)
    assert once["vision"] / TERA == pytest.approx(clip, rel=5e-3)
    assert (once["llm"] + once["lm_head"]) / TERA == pytest.approx(llm, rel=3e-3)
    assert (step["llm"] + step["lm_head"]) / TERA == pytest.approx(llm_step, rel=3e-3)
    assert sum(step.values()) / TERA == pytest.approx(total, rel=3e-3)
    assert step["sam_encoder"] == once["sam_encoder"]  # frozen, and nothing below it trains


def test_clip_counts_the_layers_that_run():
    config = big(224)
    every = flops.forward(config, 512)["vision"]
    config.model.vision.feature_layer = -2
    assert flops.forward(config, 512)["vision"] / every == pytest.approx(31 / 32, rel=2e-3)


def test_shared_images_and_cached_features_take_less():
    config = big(224)
    alone = flops.step(config, 512)
    config.data.samples_per_image = 4
    shared = flops.step(config, 512)
    assert shared["sam_encoder"] == alone["sam_encoder"] / 4 and shared["llm"] == alone["llm"]
    config.data.features = True
    cached = flops.step(config, 512)
    assert cached["sam_encoder"] == cached["vision"] == 0 and cached["llm"] == alone["llm"]


# --- what the model's own trace holds


def traced(config, length: int):
    """(forward, gradient of what trains): jaxprs of one batch, nothing computed."""
    graphdef, shapes = mimo.abstract(config)
    rates = parameters.multipliers(config, shapes)
    trained, frozen = pathtree.partition(shapes, lambda path: rates[path] is not None)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in random_batch(config, length=length).items()}

    def loss(trained, frozen, batch):
        model = scan.bind(graphdef, pathtree.merge(trained, frozen))
        out = model(batch)
        attention = 0.0 if out["attention_map"] is None else out["attention_map"].mean()
        return model.logits(out["hidden"]).mean() + out["masks"].mean() + out["iou"].mean() + attention

    return [jax.make_jaxpr(f)(trained, frozen, batch).jaxpr for f in (loss, jax.grad(loss))]


def products(jaxpr) -> float:
    """FLOPs of all matrix products and convolutions, those in a loop as often as it turns."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2.0 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel, out_features = eqn.invars[1].aval, eqn.params["dimension_numbers"].rhs_spec[0]
            total += 2.0 * eqn.outvars[0].aval.size * kernel.size / kernel.shape[out_features]
        inner = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(products(j) for j in inner if hasattr(j, "eqns"))
    return total


def lora_under_a_trained_encoder():
    config = tiny_lora.get_config()
    config.trainables[r"^vision/"] = 1.0
    return config


def without_queries():
    config = tiny.get_config()
    config.model.aligner.kind, config.train.loss.attention_map = "none", 0.0
    return config


def beyond(config, length: int, sam: int = 1, llm: int = 1) -> float:
    """What the trace holds of attention and the formula does not: the other half of causal squares, and keys made wider by folded
    positions; each so many times."""
    m, s = config.model, config.model.sam
    grid = s.image_size // s.patch_size
    blocks = s.layers // s.global_every
    windows = (s.global_every - 1) * (-(-grid // s.window)) ** 2
    folded = blocks * (windows * 4 * s.heads * s.window**5 + 4 * s.heads * grid**5) / config.data.samples_per_image
    return sam * folded + llm * 2 * m.llm.layers * m.llm.width * length**2


@pytest.mark.parametrize(
    ("make", "length", "sam_passes"),
    [
        (mimo_7b.get_config, 768, 1),
        (lisa_7b.get_config, 512, 1),
        (tiny.get_config, 56, 3),
        (lora_under_a_trained_encoder, 64, 1),
        (without_queries, 240, 3),
    ],
)
def test_the_formula_counts_what_the_trace_holds(make, length, sam_passes):
    config = make()
    config.model.remat = "none"
    forward, gradient = (products(jaxpr) / config.data.batch_size for jaxpr in traced(config, length))
    assert sum(flops.forward(config, length).values()) == pytest.approx(forward - beyond(config, length), rel=0.02)
    assert sum(flops.step(config, length).values()) == pytest.approx(gradient - beyond(config, length, sam_passes, 3), rel=0.03)


def test_the_formula_counts_what_xla_does():
    """Layers written out and wide, so that products outweigh all else, which XLA counts too."""
    config = tiny_config(unroll=True)
    m = config.model
    m.vision.width = m.aligner.width = m.llm.width = m.sam.width = 256
    m.vision.mlp_width = m.llm.mlp_width = 1024
    graphdef, shapes = mimo.abstract(config)
    batch = jax.tree.map(jnp.asarray, random_batch(config))

    def run(params, batch):
        model = scan.bind(graphdef, params)
        out = model(batch)
        return model.logits(out["hidden"]), out["masks"], out["iou"]

    xla = jax.jit(run).lower(shapes, batch).compile().cost_analysis()["flops"] / config.data.batch_size
    assert sum(flops.forward(config, 40).values()) == pytest.approx(xla, rel=0.05)
