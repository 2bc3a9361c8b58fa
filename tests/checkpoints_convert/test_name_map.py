import dataclasses
import gzip
import json
from pathlib import Path

import hypothesis
import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert import name_map
from checkpoints_convert.layouts import with_prefix
from checkpoints_convert.name_map import KeyMapError, export_state, import_state
from checkpoints_convert.ops import OPS, copy
from checkpoints_convert.rows import CLIP, CLIP_IGNORED, SAM, Row
from mimo_jax import pathtree
from mimo_jax.model_config import ClipConfig, ModelConfig, SamVitConfig
from mimo_jax.models import scan
from mimo_jax.models.clip_vit import ClipVit
from mimo_jax.models.sam_decoder import MaskDecoder, SamPromptEncoder
from mimo_jax.models.sam_encoder import SamEncoder

ROOTS = {"vision": ClipVit, "sam_encoder": SamEncoder, "sam_prompt": SamPromptEncoder, "sam_decoder": MaskDecoder}
TINY = ModelConfig(
    vision=ClipConfig(image_size=16, patch_size=8, width=8, layers=3, heads=2, mlp_width=12),
    sam=SamVitConfig(
        image_size=32, patch_size=8, width=8, layers=4, heads=2, window=3, global_every=2, decoder_width=32, decoder_layers=3,
        decoder_heads=2, decoder_mlp_width=12, iou_head_width=6,
    ),
)  # fmt: skip


def published(source: str) -> dict[str, tuple[int, ...]]:
    """{key: shape} of the real checkpoint."""
    with gzip.open(Path(__file__).with_name("state_dict_shapes.json.gz"), "rt") as file:
        return {key: tuple(shape) for key, shape in json.load(file)[source].items()}


_LEAVES: dict[str, dict] = {}


def leaves_of(cfg: ModelConfig, *roots: str) -> dict:
    """{path: ShapeDtypeStruct} of the modules at these roots."""
    leaves = {}
    for root in roots:
        part = cfg.vision if root == "vision" else cfg.sam
        key = f"{root} {part}"
        if key not in _LEAVES:
            _, params = scan.abstract(lambda rngs, root=root, part=part: ROOTS[root](part, rngs=rngs))
            _LEAVES[key] = {f"{root}/{path}": leaf for path, leaf in pathtree.flatten(params).items()}
        leaves |= _LEAVES[key]
    return leaves


CASES = {"clip": (CLIP, ("vision",)), "sam": (SAM, ("sam_encoder", "sam_prompt", "sam_decoder"))}


def random_tensors(rows, roots, cfg=TINY, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = name_map.torch_shapes(leaves_of(cfg, *roots), rows, name_map.layer_indices(cfg))
    return {key: rng.standard_normal(shape).astype(dtype) for key, shape in shapes.items()}


def test_full_size_clip_has_every_published_tensor():
    rows = with_prefix(CLIP, "vision_model.")
    shapes = name_map.torch_shapes(leaves_of(ModelConfig(), "vision"), rows, name_map.layer_indices(ModelConfig()))
    assert shapes == published("clip_vit_h14_hf_vision")
    assert len(shapes) == 519


def test_full_size_sam_has_every_published_tensor():
    shapes = name_map.torch_shapes(leaves_of(ModelConfig(), *CASES["sam"][1]), SAM, name_map.layer_indices(ModelConfig()))
    assert shapes == published("sam_vit_h")
    assert len(shapes) == 594


@pytest.mark.parametrize(
    ("changes", "whole"), [({"layers": 12, "global_every": 3}, [2, 5, 8, 11]), ({"layers": 24, "global_every": 6}, [5, 11, 17, 23])]
)
def test_global_blocks_of_base_and_large(changes, whole):
    cfg = ModelConfig(sam=SamVitConfig(**changes))
    shapes = name_map.torch_shapes(leaves_of(cfg, "sam_encoder"), SAM, name_map.layer_indices(cfg))
    sizes = [shapes[f"image_encoder.blocks.{i}.attn.rel_pos_h"][0] for i in range(changes["layers"])]
    assert [i for i, size in enumerate(sizes) if size == 127] == whole
    assert set(sizes) == {27, 127}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_import_then_export_gives_the_same_bits(case, dtype):
    rows, roots = CASES[case]
    tensors = random_tensors(rows, roots, dtype=jnp.dtype(dtype))
    indices = name_map.layer_indices(TINY)
    leaves = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in leaves_of(TINY, *roots).items()}
    params = import_state(tensors, rows, indices, leaves)
    assert {path: value.shape for path, value in params.items()} == {p: leaf.shape for p, leaf in leaves_of(TINY, *roots).items()}
    back = export_state(params, rows, indices)
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert back[key].dtype == value.dtype and back[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("changes", [{"global_every": 1}, {"global_every": 4}, {"decoder_layers": 1}])
def test_sam_without_windows_or_with_one_decoder_layer(changes):
    cfg = dataclasses.replace(TINY, sam=dataclasses.replace(TINY.sam, **changes))
    rows, roots = CASES["sam"]
    tensors, indices = random_tensors(rows, roots, cfg), name_map.layer_indices(cfg)
    back = export_state(import_state(tensors, rows, indices, leaves_of(cfg, *roots)), rows, indices)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[key], value) for key, value in tensors.items())


def test_every_problem_is_listed_in_one_error():
    tensors = random_tensors(CLIP, ("vision",))
    del tensors["encoder.layers.1.mlp.fc1.bias"], tensors["post_layernorm.weight"]
    tensors["encoder.layers.3.mlp.fc1.bias"] = np.zeros(12, np.float32)
    tensors["embeddings.class_embedding"] = np.zeros(9, np.float32)
    with pytest.raises(KeyMapError) as error:
        import_state(tensors, CLIP, name_map.layer_indices(TINY), leaves_of(TINY, "vision"), CLIP_IGNORED)
    message = str(error.value)
    assert "2 missing:\n  encoder.layers.1.mlp.fc1.bias\n  post_layernorm.weight\n" in message
    assert "1 left over:\n  encoder.layers.3.mlp.fc1.bias\n" in message
    assert "1 of another shape:\n  embeddings.class_embedding [9], wanted [8]" in message


def test_a_parameter_without_a_row_is_refused():
    leaves = leaves_of(TINY, "vision") | {"vision/new/kernel": np.zeros(3)}
    with pytest.raises(KeyMapError, match="no row names the parameters vision/new/kernel"):
        name_map.torch_shapes(leaves, CLIP, name_map.layer_indices(TINY))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row("w", "a", "flip"), "unknown op 'flip'; known are identity, linear"),
        (Row("w.{layer}", "a"), "unknown placeholder {layer}"),
        (Row("w", "{a,b}"), "the parameters lack b"),
    ],
)
def test_a_bad_row_is_named(row, message):
    with pytest.raises(KeyMapError, match=message):
        name_map.torch_shapes({"a": np.zeros(2)}, [row], {"depth": np.arange(2)})


def test_packed_parts_may_differ_in_size():
    """As base and added rows of one vocabulary do."""
    rows = (Row("embed.weight", "embedding/{base,added}", "linear"),)
    tensor = np.arange(10.0).reshape(5, 2)
    leaves = {"embedding/base": np.zeros((2, 4)), "embedding/added": np.zeros((2, 1))}
    params = import_state({"embed.weight": tensor}, rows, {}, leaves)
    np.testing.assert_array_equal(params["embedding/added"], [[8.0], [9.0]])
    np.testing.assert_array_equal(export_state(params, rows, {})["embed.weight"], tensor)


RANK = {"identity": 3, "linear": 2, "conv": 4, "conv_transpose": 4, "squeeze": 3, "pointwise": 4, "depthwise": 4}
ONE = {"squeeze": (0,), "pointwise": (2, 3), "depthwise": (1,)}  # axes of length 1


def test_every_op_is_tested():
    assert RANK.keys() == OPS.keys()


@hypothesis.given(hypothesis.strategies.data())
def test_every_op_is_undone_by_its_inverse(data):
    name = data.draw(hypothesis.strategies.sampled_from(sorted(OPS)))
    shape = data.draw(arrays.array_shapes(min_dims=RANK[name], max_dims=RANK[name], max_side=4))
    shape = tuple(1 if axis in ONE.get(name, ()) else size for axis, size in enumerate(shape))
    tensor = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(OPS[name].to_torch(OPS[name].to_flax(tensor)), tensor)


@pytest.mark.parametrize(("name", "shape"), [("squeeze", (2, 3)), ("pointwise", (4, 3, 3, 3)), ("depthwise", (4, 2, 3, 3))])
def test_no_op_drops_values(name, shape):
    with pytest.raises(ValueError):
        OPS[name].to_flax(np.zeros(shape))


@hypothesis.given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=70)))
def test_copying_a_transposed_matrix_changes_nothing(matrix):
    made = np.empty(matrix.T.shape, matrix.dtype)
    copy(made, matrix.T)
    np.testing.assert_array_equal(made, matrix.T)


def test_values_are_cast_to_the_dtype_of_the_parameter():
    values = np.array([1.0, 1.0 + 2**-9, 3.1], np.float32)
    params = import_state({"w": values}, [Row("w", "a")], {}, {"a": jax.ShapeDtypeStruct((3,), jnp.bfloat16)})
    assert params["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["a"].astype(np.float32), np.array([1.0, 1.0, 3.09375], np.float32))
