"""The one table: it covers every parameter of every config, and full-size specs do what they say."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from mimo_jax import pathtree, sharding
from mimo_jax.config import ConfigError, MeshConfig
from mimo_jax.flags import find_config, read_config_file
from mimo_jax.models import mimo
from tests.tiny_config import tiny_config

FULL = ("tiny", "tiny_lora", "small", "mimo_7b", "lisa_7b")


@pytest.fixture(scope="module", params=FULL)
def shapes(request):
    config = read_config_file(find_config(f"configs/{request.param}.py"))
    return request.param, pathtree.flatten(mimo.abstract(config)[1])


def test_every_parameter_of_every_config_is_covered(shapes):
    _, flat = shapes
    for path, leaf in flat.items():
        assert len(sharding.spec(path, leaf.shape)) <= len(leaf.shape)


@pytest.mark.parametrize("shapes", ["small", "mimo_7b", "lisa_7b"], indirect=True)
def test_big_matrices_are_all_sharded(shapes):
    """Nothing above 8 M parameters a layer may be replicated by oversight."""
    _, flat = shapes
    for path, leaf in flat.items():
        if leaf.ndim >= 2 and leaf.shape[-1] * leaf.shape[-2] > 8_000_000:
            assert set(sharding.spec(path, leaf.shape)) >= {"fsdp", "tensor"}, path


def test_specs_are_written_for_trailing_axes():
    assert sharding.spec("llm/layers/block/q/kernel", (32, 4096, 4096)) == P(None, "fsdp", "tensor")
    assert sharding.spec("sam_encoder/stages/block/windowed/block/o/kernel", (4, 7, 1280, 1280)) == P(None, None, "tensor", "fsdp")
    assert sharding.spec("embedding/base", (32000, 4096)) == P("tensor", "fsdp")


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(KeyError, match="no row matches parameter 'novel/kernel'"):
        sharding.spec("novel/kernel", (2, 2))


def test_a_mesh_must_fill_the_devices():
    count = jax.device_count()
    assert dict(sharding.make_mesh(MeshConfig()).shape) == {"data": count, "fsdp": 1, "tensor": 1}
    with pytest.raises(ConfigError, match="config.mesh"):
        sharding.make_mesh(MeshConfig(tensor=count + 1))
    with pytest.raises(ConfigError, match="config.mesh"):
        sharding.make_mesh(MeshConfig(data=-1, fsdp=-1))


def test_an_axis_that_does_not_divide_is_named():
    mesh = jax.sharding.AbstractMesh((1, 1, 3), sharding.AXES)
    with pytest.raises(ConfigError, match=r"config.mesh.tensor: 3 does not divide axis of \d+ of parameter"):
        sharding.of_params(mimo.abstract(tiny_config())[1], mesh)
