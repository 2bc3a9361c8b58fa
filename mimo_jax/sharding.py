"""Where every array lives: one ordered table from parameter path to mesh axes, used by all who place parameters.

Specs are written for the trailing axes of a parameter; leading axes (stacked layers, SAM's stages) are
never sharded. Mesh axes: `data` (samples), `fsdp` (samples, and parameters where they are sharded),
`tensor` (heads and MLP columns).
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mimo_jax import pathtree
from mimo_jax.config import ConfigError, LlamaConfig, MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# path regex -> axes of the trailing dimensions; the first match decides.
RULES: dict[str, tuple[str | None, ...]] = {
    r"^embedding/base$": ("tensor", "fsdp"),
    r"^lm_head/base$": ("fsdp", "tensor"),
    r"^(embedding|lm_head)/grounding$": (),
    r"^llm/.*/(q|k|v|gate|up)/kernel(_int8|_int4)?$": ("fsdp", "tensor"),
    r"^llm/.*/(o|down)/kernel(_int8|_int4)?$": ("tensor", "fsdp"),
    r"^llm/.*/(q|k|v|gate|up)/kernel_scale$": (None, "tensor"),  # groups of inputs are few, and need not divide
    r"^llm/.*/(o|down)/kernel_scale$": (None, "fsdp"),
    r"/lora_[ab]$": (),
    r"^llm/.*norm/scale$": (),
    r"^(clip|sam_encoder)/.*/(q|k|v|up)/kernel$": ("fsdp", "tensor"),
    r"^(clip|sam_encoder)/.*/(o|down)/kernel$": ("tensor", "fsdp"),
    r"^(clip|sam_encoder)/": (),
    r"^(seg_projection/hidden|aligner/project_out)/kernel$": ("fsdp", "tensor"),
    r"^(prompt|aligner|seg_projection|sam_prompt|sam_decoder)/": (),
}


def make_mesh(cfg: MeshConfig) -> Mesh:
    """A mesh over all devices; ConfigError if the axes do not multiply to their number."""
    count = jax.device_count()
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    if -1 in sizes:
        rest = int(np.prod([s for s in sizes if s != -1]))
        if sizes.count(-1) > 1 or count % rest:
            raise ConfigError(f"config.mesh: {cfg.data} x {cfg.fsdp} x {cfg.tensor} does not fill {count} devices")
        sizes[sizes.index(-1)] = count // rest
    if int(np.prod(sizes)) != count:
        raise ConfigError(f"config.mesh: {sizes[0]} x {sizes[1]} x {sizes[2]} does not make {count} devices")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def inference_mesh(llm: LlamaConfig) -> Mesh | None:
    """A mesh over the devices of this process for a model that answers; None where there is one device alone. They split the heads
    of the language model, and with them its KV cache, where they divide them; else only its parameters (`fsdp`)."""
    devices = jax.local_devices()
    count = len(devices)
    if count == 1:
        return None
    sizes = (1, 1, count) if llm.heads % count == 0 and llm.kv_heads % count == 0 else (1, count, 1)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def spec(path: str, shape: tuple[int, ...]) -> P:
    """PartitionSpec of one parameter; KeyError if no row of RULES covers it."""
    axes = pathtree.first_match(path, RULES, "sharding.RULES")
    return P(*([None] * (len(shape) - len(axes))), *axes) if axes else P()


def of_params(tree: dict, mesh: Mesh, whole: dict[str, str] | None = None) -> dict:
    """NamedSharding for every leaf of a nested dict of arrays (or shapes). Where an axis does not divide: ConfigError, or, if a dict
    `whole` is given, that dimension is not split, and `whole` says why by the parameter's path."""
    made = {}
    for path, leaf in pathtree.flatten(tree).items():
        partition = list(spec(path, leaf.shape))
        for i, (size, axis) in enumerate(zip(leaf.shape, partition, strict=False)):
            if axis is not None and size % mesh.shape[axis]:
                reason = f"{mesh.shape[axis]} does not divide axis of {size} of parameter {path}"
                if whole is None:
                    raise ConfigError(f"config.mesh.{axis}: {reason}")
                partition[i], whole[path] = None, reason
        made[path] = NamedSharding(mesh, P(*partition))
    return pathtree.unflatten(made)


def of_cache(mesh: Mesh, llm: LlamaConfig) -> NamedSharding:
    """Keys and values [N, B, G, S, K] (see `Llama.new_cache`): heads G over `tensor`, where it divides them."""
    return NamedSharding(mesh, P(None, None, "tensor") if llm.kv_heads % mesh.shape["tensor"] == 0 else P())


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def of_batch(mesh: Mesh) -> NamedSharding:
    """Leading axis of every array of a batch, over `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)
