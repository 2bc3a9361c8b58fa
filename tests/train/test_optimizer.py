"""Adam and Muon on a few matrices: what is orthogonalised, how large an update is, and the multipliers of paths."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import mimo_7b
from mimo_jax import pathtree
from mimo_jax.config import TrainConfig
from mimo_jax.model_config import LoraConfig
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


# Last names of parameters -> whether weight decay applies; those of the embedding and the head have the same names.
KINDS_OF_LEAVES = {
    True: "kernel lora_a lora_b lm_head/base lm_head/grounding",
    False: """bias scale embedding/base embedding/grounding class_embedding position_embedding rel_pos_h rel_pos_w modality_embedding
        null_prompt queries fourier_basis kind gaussian point_embedding not_a_point_embedding no_mask_embedding iou_token mask_tokens""",
}


def trees() -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes by path of models with every kind of stack: layers, and SAM's stages of layers."""
    tiny = tiny_config(lora=LoraConfig(rank=2, alpha=2.0))
    tiny.model.sam.layers, tiny.model.sam.global_every = 6, 3
    return {config.name: pathtree.flatten(mimo.abstract(config)[1]) for config in (tiny, mimo_7b.get_config())}


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_weight_decay_shrinks_matrices_alone_in_whatever_stack(kind):
    """Without gradients, a step is the decay alone, by the kind of the parameter."""
    expected = {name: decays for decays, names in KINDS_OF_LEAVES.items() for name in names.split()}
    some = r"^llm/.*/(q|mlp_norm)/|_encoder/stages/block/windowed/block/(q|mlp_norm)/|/grounding$|/mask_tokens$"  # fewer compile sooner
    shapes = {path: leaf for path, leaf in trees()["test"].items() if re.search(some, path)}
    config = TrainConfig(optimizer=kind, learning_rate=1.0, final_learning_rate=1.0, warmup_steps=0, weight_decay=0.1)
    made = optimizer.make_optimizer(config, dict.fromkeys(shapes, 1.0))
    params = pathtree.unflatten({path: jnp.ones(leaf.shape, jnp.float32) for path, leaf in shapes.items()})
    updates, _ = jax.jit(made.update)(jax.tree.map(jnp.zeros_like, params), made.init(params), params)
    for path, update in pathtree.flatten(updates).items():
        name = path if path.startswith(("embedding/", "lm_head/")) else path.split("/")[-1]
        np.testing.assert_allclose(update, -0.1 * expected[name], atol=1e-7, err_msg=path)


def test_every_parameter_has_its_kind():
    expected = {name: decays for decays, names in KINDS_OF_LEAVES.items() for name in names.split()}
    for path in (path for shapes in trees().values() for path in shapes):
        name = path if path.startswith(("embedding/", "lm_head/")) else path.split("/")[-1]
        assert pathtree.first_match(path, optimizer.DECAYED, "DECAYED") == expected[name], path


def test_muon_takes_matrices_by_their_axes_not_by_their_names():
    convolutions = r"/(patch|neck_in|neck_out|mask_down1|mask_down2|mask_out|upscale1|upscale2)/"
    for shapes in trees().values():
        labels = pathtree.flatten(optimizer._muon_or_adam(pathtree.unflatten(shapes)))
        wanted = {path for path in shapes if path.endswith("/kernel") and not re.search(convolutions, path)}
        assert {path for path, label in labels.items() if label == "muon"} == wanted
    new = {
        "sam_encoder/stem/kernel": ((3, 3, 8, 16), "adam"), "vision/stages/block/depthwise/kernel": ((4, 3, 3, 1, 8), "adam"),
        "vision/stages/block/inner/block/q/kernel": ((4, 2, 8, 8), "muon"), "vision/head/kernel": ((8, 8), "muon"),
    }  # fmt: skip
    labels = pathtree.flatten(optimizer._muon_or_adam(pathtree.unflatten({p: jnp.zeros(shape) for p, (shape, _) in new.items()})))
    assert labels == {path: label for path, (_, label) in new.items()}


def test_a_gradient_is_clipped_before_the_moments():
    config = TrainConfig(learning_rate=1.0, final_learning_rate=1.0, warmup_steps=0, max_grad_norm=1e-3)
    made = optimizer.make_optimizer(config, dict.fromkeys(SHAPES, 1.0))
    params = tree()
    _, state = made.update(tree(1), made.init(params), params)
    moment = optax.tree.get(state, "mu")
    assert optax.tree.norm(moment) == pytest.approx(0.1 * 1e-3, rel=1e-3)
