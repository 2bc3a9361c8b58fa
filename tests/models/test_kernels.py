"""Which kernel serves where, told without a device; and every kernel that runs here against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.models import kernels
from mimo_jax.models.attention import attention, fold_relative_position
from mimo_jax.models.mesh import MeshContext

MESH = jax.sharding.AbstractMesh((1, 1, 16, 1), ("slice", "data", "fsdp", "tensor"))
TPU, ONE_TPU, LOST_TPU = MeshContext("tpu", 0, 16, MESH), MeshContext("tpu", 0, 1), MeshContext("tpu", 0, 8)
HOPPER, AMPERE, TURING, CPU = (MeshContext(*row) for row in (("gpu", 9.0, 8), ("gpu", 8.0, 8), ("gpu", 7.5, 1), ("cpu", 0, 1)))
SAM = (4096, 4096, 208)  # a global block at 1024 pixels: 80 and twice 64
LLM = (768, 768, 128)


@pytest.mark.parametrize(
    ("at", "dtype", "shape", "kernel"),
    [
        (TPU, "bfloat16", SAM, "splash"),
        (TPU, "bfloat16", LLM, "splash"),
        (ONE_TPU, "float32", SAM, "splash"),
        (LOST_TPU, "bfloat16", SAM, "chunked"),  # several devices, and nobody says how the work is split
        (TPU, "bfloat16", (257, 257, 80), "plain"),  # CLIP
        (TPU, "bfloat16", (196, 196, 108), "plain"),  # SAM's windows
        (TPU, "bfloat16", (4100, 4100, 208), "chunked"),  # no whole tiles
        (HOPPER, "bfloat16", SAM, "cudnn"),
        (HOPPER, "bfloat16", LLM, "cudnn"),
        (HOPPER, "float32", SAM, "chunked"),
        (HOPPER, "float32", LLM, "plain"),
        (AMPERE, "bfloat16", SAM, "chunked"),
        (AMPERE, "float16", LLM, "cudnn"),
        (AMPERE, "bfloat16", (196, 196, 108), "plain"),
        (TURING, "float16", LLM, "plain"),
        (CPU, "float32", SAM, "chunked"),
        (CPU, "bfloat16", LLM, "plain"),
        (TPU, "bfloat16", (1, 768, 128), "plain"),  # a new token
    ],
)
def test_the_choice(at, dtype, shape, kernel):
    assert kernels.select_kernel(at, dtype, *shape) == kernel


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk_logits", [40 * 8, 40 * 7, 1])
def test_chunked_is_plain_with_its_gradients(monkeypatch, causal, chunk_logits):
    """Also where chunks do not divide the queries."""
    monkeypatch.setattr(kernels, "_CHUNK_LOGITS", chunk_logits)
    q, k, v, weight = draw(2, 40, 3, 8), draw(2, 40, 3, 8, seed=1), draw(2, 40, 3, 6, seed=2), draw(2, 40, 3, 6, seed=3)

    def plain(q, k, v):
        return (attention(q, k, v, scale=0.4, causal=causal) * weight).sum()

    def chunked(q, k, v):
        return (kernels.run_chunked(q, k, v, 0.4, causal) * weight).sum()

    for a, b in zip(*(jax.tree.leaves(jax.value_and_grad(f, (0, 1, 2))(q, k, v)) for f in (plain, chunked)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_long_sequences_take_the_chunked_form(monkeypatch):
    monkeypatch.setattr(kernels, "_LONG", 100)
    monkeypatch.setattr(kernels, "_CHUNK_LOGITS", 64)
    q, k, v = draw(1, 16, 4, 8), draw(1, 16, 2, 8, seed=1), draw(1, 16, 2, 8, seed=2)
    jaxpr = str(jax.make_jaxpr(lambda: attention(q, k, v, causal=True))())
    assert "scan" in jaxpr
    wanted = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(attention(q, k, v, causal=True), wanted, atol=1e-6)


@pytest.mark.parametrize(("causal", "groups"), [(False, 2), (True, 2), (True, 1)])
def test_splash_is_plain_with_its_gradients(causal, groups):
    """Interpreted: as the kernel computes, on any device."""
    q, k, v = draw(1, 256, 2, 16), draw(1, 256, groups, 16, seed=1), draw(1, 256, groups, 8, seed=2)
    weight = draw(1, 256, 2, 8, seed=3)

    def splash(q, k, v):
        return (kernels.run_splash(q, k, v, 0.3, causal, ONE_TPU, interpret=True) * weight).sum()

    def plain(q, k, v):
        return (attention(q, k, v, scale=0.3, causal=causal) * weight).sum()

    for a, b in zip(*(jax.tree.leaves(jax.value_and_grad(f, (0, 1, 2))(q, k, v)) for f in (plain, splash)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_sam_folded_through_splash_is_the_plain_form():
    q, k, v = (draw(1, 256, 2, 8, seed=seed) for seed in range(3))
    q, k = fold_relative_position(q, k, draw(31, 8, seed=3), draw(31, 8, seed=4), scale=8**-0.5)
    out = kernels.run_splash(q, k, v, 1.0, False, ONE_TPU, interpret=True)
    np.testing.assert_allclose(out, attention(q, k, v, scale=1.0), atol=1e-4)
