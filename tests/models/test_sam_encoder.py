import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from checkpoints_convert import rows
from mimo_jax import pathtree
from mimo_jax.model_config import ModelConfig, SamVitConfig
from mimo_jax.models import scan
from mimo_jax.models.sam_decoder import MaskDecoder, SamPromptEncoder
from mimo_jax.models.sam_encoder import SamEncoder, from_windows, to_windows
from mimo_jax.models.scan import ScanConfig
from tests.models import oracles

ROWS = tuple(row for row in rows.SAM if row.path.startswith("sam_encoder/"))


def tiny(**changes) -> SamVitConfig:
    sizes = {"image_size": 64, "patch_size": 8, "width": 48, "layers": 4, "heads": 4, "window": 3, "global_every": 2, "decoder_width": 32}
    return SamVitConfig(**{**sizes, **changes})


def torch_model(cfg: SamVitConfig) -> torch.nn.Module:
    return oracles.randomised(
        oracles.segment_anything().ImageEncoderViT(
            img_size=cfg.image_size, patch_size=cfg.patch_size, embed_dim=cfg.width, depth=cfg.layers, num_heads=cfg.heads,
            mlp_ratio=cfg.mlp_ratio, out_chans=cfg.decoder_width, norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True, window_size=cfg.window, global_attn_indexes=range(cfg.global_every - 1, cfg.layers, cfg.global_every),
        )
    )  # fmt: skip


def pixels(cfg: SamVitConfig) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((2, cfg.image_size, cfg.image_size, 3)).astype(np.float32)
    x[:, cfg.image_size // 2 + 3 :] = 0.0  # the padding of a wide image
    return x


def here(cfg: SamVitConfig, oracle: torch.nn.Module, grads: bool = False, **kwargs):
    make = lambda rngs: SamEncoder(cfg, rngs=rngs, **kwargs)  # noqa: E731
    return oracles.brought_here(oracle, make, "sam_encoder", ROWS, ModelConfig(sam=cfg), prefix="image_encoder.", grads=grads)


@pytest.mark.parametrize(
    "changes",
    [
        {},  # the window does not divide the grid
        {"window": 4, "global_every": 4},  # it does; one stage
        {"window": 14},  # the grid is smaller than the window
        {"global_every": 1, "layers": 2},  # no windows
        {"global_every": 3, "layers": 6, "mlp_ratio": 2.5, "window": 8},
        {"global_every": 3, "layers": 12, "width": 16},  # the stages of ViT-B,
        {"global_every": 6, "layers": 24, "width": 16},  # ViT-L
        {"global_every": 8, "layers": 32, "width": 16},  # and ViT-H
    ],
    ids=str,
)
def test_features_are_segment_anythings(changes):
    cfg = tiny(**changes)
    oracle, x = torch_model(cfg), pixels(cfg)
    with torch.no_grad():
        wanted = oracle(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    graphdef, params = here(cfg, oracle)
    found = jax.jit(lambda p, x: scan.bind(graphdef, p)(x))(params, x)
    assert oracles.relative_l2(found, wanted) <= 1e-5


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_are_segment_anythings(remat):
    cfg = tiny()
    oracle, x = torch_model(cfg), pixels(cfg)
    weights = np.random.default_rng(1).standard_normal((2, 8, 8, 32)).astype(np.float32)
    (oracle(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1) * torch.from_numpy(weights)).sum().backward()
    _, wanted = here(cfg, oracle, grads=True)
    graphdef, params = here(cfg, oracle, scan=ScanConfig(remat))
    found = jax.jit(jax.grad(lambda p: jnp.sum(weights * scan.bind(graphdef, p)(x))))(params)
    oracles.assert_same_gradients(found, wanted, 1e-4)
    for path, gradient in pathtree.flatten(found).items():
        assert np.linalg.norm(gradient) > 0, path


def test_bfloat16_is_near_float32():
    cfg = tiny()
    oracle, x = torch_model(cfg), pixels(cfg)
    exact, found = (
        jax.jit(lambda p, x, graphdef=graphdef: scan.bind(graphdef, p)(x))(params, x)
        for graphdef, params in (here(cfg, oracle), here(cfg, oracle, dtype=jnp.bfloat16))
    )
    assert found.dtype == jnp.bfloat16
    assert oracles.relative_l2(found.astype(jnp.float32), exact) < 0.03


@pytest.mark.parametrize(("g", "w"), [(8, 4), (8, 3), (5, 14)])
def test_windows_come_back(g, w):
    x = jnp.arange(2.0 * g * g * 3).reshape(2, g, g, 3)
    windows = to_windows(x, w)
    side = -(-g // w)
    assert windows.shape == (2 * side * side, w, w, 3)
    np.testing.assert_array_equal(windows[0, : min(g, w), : min(g, w)], x[0, :w, :w])
    np.testing.assert_array_equal(from_windows(windows, g), x)


def test_huge_has_its_published_size():
    cfg = SamVitConfig()
    count = 0
    for make in (SamEncoder, SamPromptEncoder, MaskDecoder):
        _, params = scan.abstract(lambda rngs, make=make: make(cfg, rngs=rngs))
        count += sum(leaf.size for leaf in pathtree.flatten(params).values())
    assert round(count / 1e6, 2) == 641.09
