"""The real libraries, with random weights, as numeric oracles, and their weights brought here through the name table."""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

import numpy as np
import torch

from checkpoints_convert import name_map
from mimo_jax import pathtree
from mimo_jax.model_config import ModelConfig
from mimo_jax.models import scan

# What segment-anything takes from torchvision. No build of that loads beside a CPU torch, and its models need none of it.
_STUBS = {
    "torchvision": (),
    "torchvision.ops": (),
    "torchvision.ops.boxes": ("batched_nms", "box_area"),
    "torchvision.transforms": (),
    "torchvision.transforms.functional": ("resize", "to_pil_image"),
}


@functools.cache
def segment_anything() -> ModuleType:
    """`segment_anything.modeling`, imported over stubs that are gone again when this returns."""
    before = {name: sys.modules.get(name) for name in _STUBS}
    try:
        for name, members in _STUBS.items():
            stub = ModuleType(name)
            for member in members:
                setattr(stub, member, None)
            sys.modules[name] = stub
        return importlib.import_module("segment_anything.modeling")
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """`module` in eval mode with every parameter drawn at random, also those that are initialised to zero or one."""
    generator = torch.Generator().manual_seed(seed)
    matrices = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d)
    with torch.no_grad():
        for part in module.modules():
            for name, value in part.named_parameters(recurse=False):
                noise = torch.randn(value.shape, generator=generator)
                if isinstance(part, matrices) and name == "weight":
                    value.copy_(noise * value[0].numel() ** -0.5)
                elif "norm" in type(part).__name__.lower() and name == "weight":
                    value.copy_(1 + 0.3 * noise)
                else:
                    value.copy_(0.3 * noise)
    return module.eval()


def brought_here(module: torch.nn.Module, make, root: str, rows, cfg: ModelConfig, prefix: str = "", grads: bool = False):
    """(graphdef, parameters) of the module that `make` builds, with the weights of a torch `module`; with `grads`, the
    torch gradients in the parameters' place (zero where torch has none). `root` is its place in the model, such as "sam_encoder",
    `prefix` what its keys lack."""
    graphdef, abstract = scan.abstract(make)
    leaves = {f"{root}/{path}": leaf for path, leaf in pathtree.flatten(abstract).items()}
    tensors = {f"{prefix}{key}": value.detach().numpy() for key, value in module.state_dict().items()}
    if grads:
        tensors = {key: np.zeros_like(value) for key, value in tensors.items()}
        tensors |= {f"{prefix}{key}": value.grad.numpy() for key, value in module.named_parameters() if value.grad is not None}
    flat = name_map.import_state(tensors, rows, name_map.layer_indices(cfg), leaves)
    return graphdef, pathtree.unflatten({path.removeprefix(f"{root}/"): value for path, value in flat.items()})


def relative_l2(found, wanted) -> float:
    found, wanted = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, np.float64) for x in (found, wanted))
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def assert_same_gradients(found: dict, wanted: dict, tolerance: float) -> None:
    """Every leaf finite and within `tolerance` of the oracle's, relative to itself or to a thousandth of the whole: a bias of
    the keys has no gradient but rounding, as softmax does not see it."""
    found, wanted = pathtree.flatten(found), pathtree.flatten(wanted)
    assert found.keys() == wanted.keys()
    whole = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in wanted.values()))
    for path, gradient in wanted.items():
        assert np.isfinite(found[path]).all(), path
        error = np.linalg.norm(np.asarray(found[path], np.float64) - gradient)
        assert error <= tolerance * max(np.linalg.norm(gradient), 1e-3 * whole), (path, error, np.linalg.norm(gradient), whole)
