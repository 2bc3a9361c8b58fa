import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from checkpoints_convert import name_map, rows, sources
from mimo_jax import pathtree
from mimo_jax.model_config import ModelConfig, TinyVitConfig
from mimo_jax.models import scan
from mimo_jax.models.tiny_vit import TinyVit, matmul_counts
from tests.models import oracles
from tests.models.torch_tiny_vit import random_tiny_vit

SMALL = {"image_size": 32, "widths": "8,16,24,32", "depths": "1,1,2,1", "heads": "1,2,3,4", "windows": "7,7,5,3", "decoder_width": 32}


def small(**changes) -> TinyVitConfig:
    return TinyVitConfig(**{**SMALL, **changes})


def brought_here(cfg: TinyVitConfig, oracle: torch.nn.Module, folder, **kwargs):
    """(graphdef, parameters) with the weights of `oracle`, from a file that is read as an import reads it."""
    torch.save({f"image_encoder.{key}": value for key, value in oracle.state_dict().items()}, folder / "tiny_vit.pth")
    graphdef, abstract = scan.abstract(lambda rngs: TinyVit(cfg, rngs=rngs, **kwargs))
    leaves = {f"sam_encoder/{path}": leaf for path, leaf in pathtree.flatten(abstract).items()}
    indices = name_map.layer_indices(ModelConfig(sam=cfg))
    file = sources.Source("sam", folder / "tiny_vit.pth", indices)
    name_map.check(file.shapes(), rows.TINY_VIT, indices, leaves)
    flat = dict(name_map.import_leaves(file, rows.TINY_VIT, indices, leaves))
    return graphdef, pathtree.unflatten({path.removeprefix("sam_encoder/"): value for path, value in flat.items()})


def pixels(cfg: TinyVitConfig) -> np.ndarray:
    x = np.random.default_rng(0).random((2, cfg.image_size, cfg.image_size, 3), np.float32)
    x[:, cfg.image_size // 2 + 3 :] = 0.0  # the padding of a wide image
    return x


@pytest.mark.parametrize(
    "changes",
    [
        {},  # windows that do not divide the grid
        {"image_size": 64, "patch_stride": 2, "windows": "4,4,4,4"},  # MobileSAM's patches; windows that divide it
        {"image_size": 20, "windows": "3,3,14,7"},  # sides that strides do not divide; windows greater than the grid
    ],
    ids=["LiteMedSAM", "MobileSAM", "odd"],
)
def test_feature_maps_are_those_of_torch(tmp_path, changes):
    cfg = small(**changes)
    oracle, x = random_tiny_vit(cfg), pixels(cfg)
    with torch.no_grad():
        wanted = oracle.feature_maps(torch.from_numpy(x).permute(0, 3, 1, 2))
    graphdef, params = brought_here(cfg, oracle, tmp_path)
    found = jax.jit(lambda p, x: scan.bind(graphdef, p).feature_maps(x))(params, x)
    assert [leaf.shape[1:] for leaf in found] == [(side, side, width) for side, width in cfg.feature_maps()]
    for here, there in zip(found, wanted, strict=True):
        assert oracles.relative_l2(here, there.permute(0, 2, 3, 1)) <= 1e-5
    assert found[-1].shape[1] == cfg.grid()


@pytest.mark.slow
def test_gradients_are_those_of_torch(tmp_path):
    cfg = small(image_size=16)
    oracle, x = random_tiny_vit(cfg), pixels(cfg)
    there = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    weights = np.random.default_rng(1).standard_normal((2, cfg.grid(), cfg.grid(), cfg.decoder_width)).astype(np.float32)
    (oracle(there).permute(0, 2, 3, 1) * torch.from_numpy(weights)).sum().backward()
    graphdef, params = brought_here(cfg, oracle, tmp_path, scan=scan.ScanConfig("full"))
    gradients, found = jax.jit(jax.grad(lambda p, x: jnp.sum(weights * scan.bind(graphdef, p)(x)), argnums=(0, 1)))(params, x)
    assert oracles.relative_l2(found, there.grad.permute(0, 2, 3, 1)) <= 1e-4
    for path, gradient in pathtree.flatten(gradients).items():
        assert np.linalg.norm(gradient) > 0, path


@pytest.mark.slow
def test_bfloat16_is_near_float32(tmp_path):
    cfg = small()
    oracle, x = random_tiny_vit(cfg), pixels(cfg)
    exact, found = (
        jax.jit(lambda p, x, graphdef=graphdef: scan.bind(graphdef, p)(x))(params, x)
        for graphdef, params in (brought_here(cfg, oracle, tmp_path), brought_here(cfg, oracle, tmp_path, dtype=jnp.bfloat16))
    )
    assert found.dtype == jnp.bfloat16
    assert oracles.relative_l2(found.astype(jnp.float32), exact) < 0.05


def test_the_published_encoders_have_their_sizes():
    for changes, parameters, gflops in (({}, 5.72, 74.95), ({"image_size": 1024, "patch_stride": 2}, 5.74, 77.54)):
        cfg = TinyVitConfig(**changes)
        leaves = pathtree.flatten(scan.abstract(lambda rngs, cfg=cfg: TinyVit(cfg, rngs=rngs))[1])
        counts = matmul_counts(cfg)
        flops = counts.products + sum(
            2 * leaf.size * pathtree.first_match(f"sam_encoder/{path}", counts.tokens, "counts")
            for path, leaf in leaves.items()
            if path.endswith("kernel")
        )
        assert cfg.feature_maps() == ((256, 64), (128, 128), (64, 160), (64, 320), (64, 256)) and not list(cfg.problems())
        assert round(sum(leaf.size for leaf in leaves.values()) / 1e6, 2) == parameters
        assert round(flops / 1e9, 2) == gflops


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"widths": "64,128,160"}, "widths"),
        ({"strides": "2,2,1,1"}, "strides"),
        ({"depths": "2,2,x,2"}, "depths"),
        ({"heads": "2,4,5,7"}, "heads"),
        ({"windows": "7,7,0,7"}, "windows"),
        ({"patch_stride": 3, "image_size": 36}, "patch_stride"),
        ({"image_size": 30, "patch_stride": 2}, "image_size"),
    ],
)
def test_settings_that_cannot_run_are_named(changes, field):
    assert [name for name, _ in small(**changes).problems()] == [field]
