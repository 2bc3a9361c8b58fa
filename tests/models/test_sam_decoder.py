import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from checkpoints_convert import rows
from mimo_jax import pathtree
from mimo_jax.model_config import ModelConfig, SamVitConfig
from mimo_jax.models import scan
from mimo_jax.models.sam_decoder import MaskDecoder, SamPromptEncoder, Upscale
from tests.models import oracles

B, S, N = 2, 3, 2  # images, masks of each, sparse prompts of a mask


def tiny(**changes) -> SamVitConfig:
    sizes = {
        "image_size": 64, "patch_size": 8, "decoder_width": 32, "decoder_heads": 4, "decoder_mlp_width": 48, "iou_head_width": 24
    }  # fmt: skip
    return SamVitConfig(**{**sizes, **changes})


def torch_decoder(cfg: SamVitConfig) -> torch.nn.Module:
    modeling = oracles.segment_anything()
    transformer = modeling.TwoWayTransformer(
        depth=cfg.decoder_layers, embedding_dim=cfg.decoder_width, mlp_dim=cfg.decoder_mlp_width, num_heads=cfg.decoder_heads
    )
    return oracles.randomised(
        modeling.MaskDecoder(transformer_dim=cfg.decoder_width, transformer=transformer, iou_head_hidden_dim=cfg.iou_head_width)
    )


def torch_prompt(cfg: SamVitConfig) -> torch.nn.Module:
    g = cfg.image_size // cfg.patch_size
    size = (cfg.image_size, cfg.image_size)
    return oracles.randomised(
        oracles.segment_anything().PromptEncoder(
            embed_dim=cfg.decoder_width, image_embedding_size=(g, g), input_image_size=size, mask_in_chans=16
        )
    )


def decoder_here(cfg: SamVitConfig, oracle: torch.nn.Module, grads: bool = False, **kwargs):
    make = lambda rngs: MaskDecoder(cfg, rngs=rngs, **kwargs)  # noqa: E731
    table = tuple(row for row in rows.SAM if row.path.startswith("sam_decoder/"))
    return oracles.brought_here(oracle, make, "sam_decoder", table, ModelConfig(sam=cfg), prefix="mask_decoder.", grads=grads)


def prompt_here(cfg: SamVitConfig, oracle: torch.nn.Module, **kwargs) -> SamPromptEncoder:
    make = lambda rngs: SamPromptEncoder(cfg, rngs=rngs, **kwargs)  # noqa: E731
    table = tuple(row for row in rows.SAM if row.path.startswith("sam_prompt/"))
    return scan.bind(*oracles.brought_here(oracle, make, "sam_prompt", table, ModelConfig(sam=cfg), prefix="prompt_encoder."))


def inputs(cfg: SamVitConfig, dense: str) -> tuple[np.ndarray, ...]:
    """features [B, g, g, C], position code [g, g, C], sparse [B, S, N, C], dense [C] or [B, S, g, g, C]."""
    g, c = cfg.image_size // cfg.patch_size, cfg.decoder_width
    draw = np.random.default_rng(0).standard_normal
    shapes = ((B, g, g, c), (g, g, c), (B, S, N, c), (c,) if dense == "shared" else (B, S, g, g, c))
    return tuple(draw(shape).astype(np.float32) for shape in shapes)


def torch_masks(oracle: torch.nn.Module, features, code, sparse, dense, multimask: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What segment-anything makes of each image on its own, stacked."""
    to_torch = lambda x: torch.from_numpy(x).movedim(-1, -3)  # noqa: E731
    if dense.ndim == 1:
        dense = np.broadcast_to(dense, (B, S, *features.shape[1:])).copy()
    outs = [
        oracle(to_torch(features[i])[None], to_torch(code)[None], torch.from_numpy(sparse[i]), to_torch(dense[i]), multimask)
        for i in range(B)
    ]
    return torch.stack([masks for masks, _ in outs]), torch.stack([iou for _, iou in outs])


@pytest.mark.parametrize(
    ("layers", "dense", "multimask"), [(1, "shared", False), (2, "shared", False), (2, "own", True), (3, "shared", True)]
)
def test_masks_are_segment_anythings(layers, dense, multimask):
    cfg = tiny(decoder_layers=layers)
    oracle, args = torch_decoder(cfg), inputs(cfg, dense)
    with torch.no_grad():
        wanted = torch_masks(oracle, *args, multimask)
    graphdef, params = decoder_here(cfg, oracle)
    found = jax.jit(lambda p, args: scan.bind(graphdef, p)(*args, multimask=multimask))(params, args)
    assert found[0].shape == (B, S, 3 if multimask else 1, 32, 32)
    assert oracles.relative_l2(found[0], wanted[0]) <= 1e-5
    assert oracles.relative_l2(found[1], wanted[1]) <= 1e-5


def test_masks_of_an_image_do_not_see_one_another():
    cfg = tiny()
    graphdef, params = decoder_here(cfg, torch_decoder(cfg))
    features, code, sparse, dense = inputs(cfg, "shared")
    decode = jax.jit(lambda sparse: scan.bind(graphdef, params)(features, code, sparse, dense))
    masks, iou = decode(sparse)
    alone, iou_alone = decode(sparse[:, 1:2])
    assert oracles.relative_l2(alone, masks[:, 1:2]) <= 1e-6
    assert oracles.relative_l2(iou_alone, iou[:, 1:2]) <= 1e-6


def test_gradients_are_segment_anythings():
    cfg = tiny()
    oracle, args = torch_decoder(cfg), inputs(cfg, "shared")
    draw = np.random.default_rng(1).standard_normal
    masks_weight, iou_weight = draw((B, S, 3, 32, 32)).astype(np.float32), draw((B, S, 3)).astype(np.float32)
    masks, iou = torch_masks(oracle, *args, True)
    ((masks * torch.from_numpy(masks_weight)).sum() + (iou * torch.from_numpy(iou_weight)).sum()).backward()
    _, wanted = decoder_here(cfg, oracle, grads=True)
    graphdef, params = decoder_here(cfg, oracle)

    def loss(params):
        masks, iou = scan.bind(graphdef, params)(*args, multimask=True)
        return jnp.sum(masks * masks_weight) + jnp.sum(iou * iou_weight)

    found = jax.jit(jax.grad(loss))(params)
    oracles.assert_same_gradients(found, wanted, 1e-4)
    for path, gradient in pathtree.flatten(found).items():
        assert np.linalg.norm(gradient) > 0, path


def test_bfloat16_gives_float32_logits_near_the_exact_ones():
    cfg = tiny()
    oracle, args = torch_decoder(cfg), inputs(cfg, "shared")
    exact, found = (
        jax.jit(lambda p, args, graphdef=graphdef: scan.bind(graphdef, p)(*args))(params, args)
        for graphdef, params in (decoder_here(cfg, oracle), decoder_here(cfg, oracle, dtype=jnp.bfloat16))
    )
    for near, wanted in zip(found, exact, strict=True):
        assert near.dtype == jnp.float32
        assert oracles.relative_l2(near, wanted) < 0.05


def test_upscale_is_conv_transpose():
    oracle = oracles.randomised(torch.nn.ConvTranspose2d(6, 5, kernel_size=2, stride=2))
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 6)).astype(np.float32)
    graphdef, _ = scan.abstract(lambda rngs: Upscale(6, 5, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs))
    weight, bias = oracle.weight.detach().numpy(), oracle.bias.detach().numpy()
    params = {"kernel": jnp.asarray(weight.transpose(0, 2, 3, 1)), "bias": jnp.asarray(bias)}
    with torch.no_grad():
        wanted = oracle(torch.from_numpy(x).movedim(-1, 1)).movedim(1, -1)
    assert oracles.relative_l2(scan.bind(graphdef, params)(x), wanted) <= 1e-6


@pytest.mark.parametrize("kind", ["points", "boxes", "points and boxes", "masks", "nothing"])
def test_prompts_are_segment_anythings(kind):
    cfg = tiny()
    oracle = torch_prompt(cfg)
    rng = np.random.default_rng(0)
    points = (rng.uniform(-1, 63, (S, 4, 2)).astype(np.float32), np.array([[1, 0, -1, 1]] * S)) if "points" in kind else None
    boxes = rng.uniform(-1, 63, (S, 4)).astype(np.float32) if "boxes" in kind else None
    masks = rng.standard_normal((S, 32, 32)).astype(np.float32) if kind == "masks" else None
    with torch.no_grad():
        sparse, dense = oracle(
            None if points is None else tuple(map(torch.from_numpy, points)),
            None if boxes is None else torch.from_numpy(boxes),
            None if masks is None else torch.from_numpy(masks)[:, None],
        )
        dense = dense.movedim(1, -1)
    # segment-anything adds half a pixel itself; here coordinates come in the continuous frame.
    found_sparse, found_dense = prompt_here(cfg, oracle)(
        None if points is None else (points[0] + 0.5, points[1]), None if boxes is None else boxes + 0.5, masks
    )
    assert found_sparse.shape == sparse.shape
    if sparse.shape[1]:
        assert oracles.relative_l2(found_sparse, sparse) <= 1e-5
    assert oracles.relative_l2(np.broadcast_to(found_dense, dense.shape), dense) <= 1e-5


def test_dense_code_is_segment_anythings_and_stays_float32():
    cfg = tiny()
    oracle = torch_prompt(cfg)
    with torch.no_grad():
        wanted = oracle.get_dense_pe()[0].movedim(0, -1)
    encoder = prompt_here(cfg, oracle, dtype=jnp.bfloat16)
    assert oracles.relative_l2(encoder.dense_pe(), wanted) <= 1e-5
    _, drawn = scan.abstract(lambda rngs: SamPromptEncoder(cfg, param_dtype=jnp.bfloat16, rngs=rngs))
    assert drawn["gaussian"].dtype == jnp.float32
    assert drawn["no_mask_embedding"].dtype == jnp.bfloat16


def test_a_code_in_bfloat16_is_that_of_lisas_fork():
    """LISA's copy of PositionEmbeddingRandom makes its grid, and all that follows, in the dtype of the matrix: bfloat16."""
    cfg = tiny(pe_dtype="bfloat16")
    oracle = torch_prompt(cfg)
    matrix = oracle.pe_layer.positional_encoding_gaussian_matrix.to(torch.bfloat16)
    grid = torch.ones((8, 8), dtype=torch.bfloat16)
    x, y = (grid.cumsum(1) - 0.5) / 8, (grid.cumsum(0) - 0.5) / 8
    coordinates = 2 * torch.stack([x, y], dim=-1) - 1
    angle = 2 * np.pi * (coordinates @ matrix)
    wanted = torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1).float().numpy()
    encoder = prompt_here(cfg, oracle)
    for found in (encoder.dense_pe(), jax.jit(lambda: encoder.dense_pe())()):
        same = np.isclose(found, wanted, rtol=2**-7, atol=2**-9)  # a step of bfloat16, where two sines round apart
        assert same.mean() > 0.999
    assert np.abs(wanted - prompt_here(tiny(), oracle).dense_pe()).max() > 0.01, "it is another code"


def test_own_prompts_lead_to_segment_anythings_masks():
    """Prompt encoder and decoder together, as SAM's own callers join them."""
    cfg = tiny()
    prompt_oracle, oracle = torch_prompt(cfg), torch_decoder(cfg)
    features = inputs(cfg, "shared")[0]
    boxes = np.array([[4, 6, 40, 50], [10, 10, 20, 30], [0, 0, 63, 63]], np.float32)
    with torch.no_grad():
        sparse, dense = prompt_oracle(None, torch.from_numpy(boxes), None)
        code = prompt_oracle.get_dense_pe()
        wanted = torch.stack([oracle(torch.from_numpy(f).movedim(-1, 0)[None], code, sparse, dense, False)[0] for f in features])
    prompt = prompt_here(cfg, prompt_oracle)
    sparse, dense = prompt(boxes=np.stack([boxes] * B) + 0.5)
    graphdef, params = decoder_here(cfg, oracle)
    masks, _ = jax.jit(lambda p, args: scan.bind(graphdef, p)(*args))(params, (features, prompt.dense_pe(), sparse, dense))
    assert oracles.relative_l2(masks, wanted) <= 1e-5
