"""Adam and Muon on a few matrices: what is orthogonalised, how large an update is, and the multipliers of paths."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mimo_jax import pathtree
from mimo_jax.config import TrainConfig
from mimo_jax.models import mimo
from mimo_jax.train import optimizer
from tests.tiny_config import tiny_config

MATRIX, SCALE = "llm/layers/block/q/kernel", "llm/norm/scale"
SHAPES = {MATRIX: (2, 8, 16), SCALE: (8,), "embedding/base": (12, 8)}


def tree(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return pathtree.unflatten({path: jnp.asarray(rng.standard_normal(shape), jnp.float32) for path, shape in SHAPES.items()})


def first_update(kind: str, **rates: float) -> dict[str, np.ndarray]:
    """Of the first step at a learning rate of 1, by path."""
    config = TrainConfig(optimizer=kind, learning_rate=1.0, final_learning_rate=1.0, warmup_steps=0, max_grad_norm=1e9)
    made = optimizer.make_optimizer(config, dict.fromkeys(SHAPES, 1.0) | rates)
    params = tree()
    update, _ = jax.jit(made.update)(tree(1), made.init(params), params)
    return {path: np.asarray(leaf) for path, leaf in pathtree.flatten(update).items()}


def test_muon_orthogonalises_each_layer_of_a_stack_to_updates_as_large_as_adams():
    muon, adam = first_update("muon"), first_update("adam")
    for layer in muon[MATRIX]:
        values = np.linalg.svd(layer, compute_uv=False) / (0.2 * 16**0.5)
        assert values.min() > 0.5 and values.max() < 1.3  # Newton and Schulz's iteration leaves them near 1
    ratio = np.sqrt(np.mean(muon[MATRIX] ** 2) / np.mean(adam[MATRIX] ** 2))
    assert 0.1 < ratio < 0.4  # 0.2, the root mean square of Adam's updates in training, against the first step's 1


def test_muon_leaves_vectors_and_tables_of_words_to_adam():
    muon, adam = first_update("muon"), first_update("adam")
    for path in (SCALE, "embedding/base"):
        np.testing.assert_array_equal(muon[path], adam[path])
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(muon[MATRIX], adam[MATRIX], atol=1e-3)


def test_multipliers_scale_the_update_of_their_path_alone():
    plain, scaled = first_update("muon"), first_update("muon", **{MATRIX: 0.25})
    np.testing.assert_allclose(scaled[MATRIX], 0.25 * plain[MATRIX], rtol=1e-6)
    np.testing.assert_array_equal(scaled[SCALE], plain[SCALE])


def test_every_part_of_the_model_has_matrices_for_muon():
    """The paths that the table of matrices names are those of the model, whatever its parts are called."""
    shapes = mimo.abstract(tiny_config())[1]
    labels = pathtree.flatten(optimizer._muon_or_adam(shapes))
    roots = {path.split("/")[0] for path, label in labels.items() if label == "muon"}
    assert roots >= {"vision", "aligner", "llm", "sam_encoder"}
    assert all(leaf.ndim >= 2 for path, leaf in pathtree.flatten(shapes).items() if labels[path] == "muon")


def test_a_gradient_is_clipped_before_the_moments():
    config = TrainConfig(learning_rate=1.0, final_learning_rate=1.0, warmup_steps=0, max_grad_norm=1e-3)
    made = optimizer.make_optimizer(config, dict.fromkeys(SHAPES, 1.0))
    params = tree()
    _, state = made.update(tree(1), made.init(params), params)
    moment = optax.tree.get(state, "mu")
    assert optax.tree.norm(moment) == pytest.approx(0.1 * 1e-3, rel=1e-3)
