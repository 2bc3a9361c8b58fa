import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.models.attention import attention, fold_relative_position


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_attend_is_jax_attention():
    q, k, v = draw(2, 5, 3, 8), draw(2, 7, 3, 8, seed=1), draw(2, 7, 3, 8, seed=2)
    mask = jnp.asarray(np.random.default_rng(3).random((2, 1, 5, 7)) < 0.7).at[..., 0].set(True)
    bias = draw(1, 3, 5, 7, seed=4)
    np.testing.assert_allclose(attention(q, k, v), jax.nn.dot_product_attention(q, k, v), atol=1e-6)
    wanted = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=0.5)
    np.testing.assert_allclose(attention(q, k, v, mask=mask, bias=bias, scale=0.5), wanted, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 5])
def test_grouped_queries_are_repeated_keys(rows):
    q, k, v = draw(2, rows, 6, 8), draw(2, 7, 2, 8, seed=1), draw(2, 7, 2, 8, seed=2)
    mask = jnp.asarray(np.random.default_rng(3).random((2, 1, rows, 7)) < 0.7).at[..., 0].set(True)
    repeated = (jnp.repeat(x, 3, axis=2) for x in (k, v))
    np.testing.assert_allclose(attention(q, k, v, mask=mask), jax.nn.dot_product_attention(q, *repeated, mask=mask), atol=1e-6)


@pytest.mark.parametrize("copies", [1, 3])
def test_shared_keys_are_repeated_keys(copies):
    n, b = 2, 2 * copies
    q, k, v = draw(b, 5, 3, 8), draw(b, 4, 3, 8, seed=1), draw(b, 4, 3, 8, seed=2)
    shared = draw(n, 7, 3, 8, seed=3), draw(n, 7, 3, 8, seed=4)
    mask = jnp.asarray(np.random.default_rng(5).random((b, 1, 5, 4)) < 0.5)
    whole_k, whole_v = (jnp.concatenate([jnp.repeat(s, copies, axis=0), x], axis=1) for s, x in zip(shared, (k, v), strict=True))
    whole_mask = jnp.concatenate([jnp.ones((b, 1, 5, 7), bool), mask], axis=-1)
    wanted = jax.nn.dot_product_attention(q, whole_k, whole_v, mask=whole_mask)
    np.testing.assert_allclose(attention(q, k, v, mask=mask, prefix_kv=shared), wanted, atol=1e-6)


def test_query_that_sees_nothing_gets_the_mean():
    q, k, v = draw(1, 2, 1, 4), draw(1, 3, 1, 4, seed=1), draw(1, 3, 1, 4, seed=2)
    mask = jnp.array([[True, False, False], [False, False, False]])[None, None]
    out = attention(q, k, v, mask=mask)
    np.testing.assert_allclose(out[0, 0], v[0, 0], atol=1e-6)
    np.testing.assert_allclose(out[0, 1], v[0].mean(axis=0), atol=1e-6)


def test_softmax_is_float32_in_bfloat16():
    q, k, v = (draw(1, 64, 2, 16, seed=s).astype(jnp.bfloat16) for s in range(3))
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert np.abs(np.asarray(out, np.float32) - exact).max() < 0.01


@pytest.mark.parametrize("g", [1, 4])
def test_folded_relative_position_is_the_bias(g):
    q, k, v = (draw(2, g * g, 3, 8, seed=s) for s in range(3))
    rows, columns = draw(2 * g - 1, 8, seed=3), draw(2 * g - 1, 8, seed=4)
    y, x = np.divmod(np.arange(g * g), g)
    bias = jnp.einsum("bthk,tsk->bhts", q, rows[y[:, None] - y[None] + g - 1])
    bias += jnp.einsum("bthk,tsk->bhts", q, columns[x[:, None] - x[None] + g - 1])
    folded_q, folded_k = fold_relative_position(q, k, rows, columns, scale=0.3)
    assert folded_q.shape == folded_k.shape == (2, g * g, 3, 8 + 2 * g)
    np.testing.assert_allclose(attention(folded_q, folded_k, v, scale=1.0), attention(q, k, v, bias=bias, scale=0.3), atol=2e-6)
