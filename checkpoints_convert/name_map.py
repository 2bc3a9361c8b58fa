"""Names of weights as data: one table, read by import and by export.

A row is (torch key, path here, op). A key may hold one placeholder, such as `{clip_layer}`: then the parameter is a
stack over `indices[placeholder]`, an array of the numbers that the key takes, whose shape is that of the stack's leading
axes (SAM: [stage, block]). A path may hold one choice, such as `{q,k,v}`: then the torch tensor packs those parameters
along its first axis. Rows of a user's own key map have the same form.

    rows = with_prefix(CLIP, find_prefix(tensors, CLIP))
    leaves = pathtree.flatten(abstract), {"clip/...": ShapeDtypeStruct}
    import:  import_state(tensors, rows, layer_indices(config.model), leaves, CLIP_IGNORED)
    export:  export_state(parameters, rows, layer_indices(config.model))

Tables of several sources in one file are simply added up. For checkpoints larger than memory, `check` takes the shapes in
a file's header, and `import_leaves` and `export_tensors` go leaf by leaf.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from checkpoints_convert.ops import OPS, Op
from mimo_jax.config import ModelConfig
from mimo_jax.errors import UserError
from mimo_jax.models.sam_decoder import MASK_TOKENS


class KeyMapError(UserError):
    """A checkpoint that does not fit the table; the message lists every key that is missing, left over or misshapen."""


class Row(NamedTuple):
    key: str
    path: str
    op: str = "identity"


Indices = Mapping[str, np.ndarray]


def layer_indices(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """What each placeholder of the tables below runs over."""
    blocks = np.arange(cfg.sam.layers).reshape(-1, cfg.sam.global_every)
    return {
        "clip_layer": np.arange(cfg.clip.layers),
        "llm_layer": np.arange(cfg.llm.layers),
        "sam_windowed": blocks[:, :-1],
        "sam_whole": blocks[:, -1],
        "sam_point": np.arange(4),
        "sam_decoder_layer": np.arange(1, cfg.sam.decoder_layers),
        "sam_mask": np.arange(MASK_TOKENS),
    }


# --- the tables


def _linear(key: str, path: str) -> tuple[Row, Row]:
    return Row(f"{key}.weight", f"{path}/kernel", "linear"), Row(f"{key}.bias", f"{path}/bias")


def _conv(key: str, path: str) -> tuple[Row, Row]:
    return Row(f"{key}.weight", f"{path}/kernel", "conv"), Row(f"{key}.bias", f"{path}/bias")


def _conv_transpose(key: str, path: str) -> tuple[Row, Row]:
    return Row(f"{key}.weight", f"{path}/kernel", "conv_transpose"), Row(f"{key}.bias", f"{path}/bias")


def _norm(key: str, path: str) -> tuple[Row, Row]:
    return Row(f"{key}.weight", f"{path}/scale"), Row(f"{key}.bias", f"{path}/bias")


_CLIP_LAYER = "encoder.layers.{clip_layer}"

# transformers' CLIPVisionModel as 5.x saves it; older files carry the prefix "vision_model.".
CLIP: tuple[Row, ...] = (
    Row("embeddings.class_embedding", "clip/class_embedding"),
    Row("embeddings.patch_embedding.weight", "clip/patch/kernel", "conv"),
    Row("embeddings.position_embedding.weight", "clip/position_embedding"),
    *_norm("pre_layrnorm", "clip/pre_norm"),
    *_norm(f"{_CLIP_LAYER}.layer_norm1", "clip/layers/block/attention_norm"),
    *_linear(f"{_CLIP_LAYER}.self_attn.q_proj", "clip/layers/block/q"),
    *_linear(f"{_CLIP_LAYER}.self_attn.k_proj", "clip/layers/block/k"),
    *_linear(f"{_CLIP_LAYER}.self_attn.v_proj", "clip/layers/block/v"),
    *_linear(f"{_CLIP_LAYER}.self_attn.out_proj", "clip/layers/block/o"),
    *_norm(f"{_CLIP_LAYER}.layer_norm2", "clip/layers/block/mlp_norm"),
    *_linear(f"{_CLIP_LAYER}.mlp.fc1", "clip/layers/block/up"),
    *_linear(f"{_CLIP_LAYER}.mlp.fc2", "clip/layers/block/down"),
    *_norm("post_layernorm", "clip/post_norm"),
)

# What else a CLIP file may hold: the text tower, both projections, the temperature, and a buffer of old versions.
CLIP_IGNORED = (
    r"^text_model\.",
    r"^(visual|text)_projection\.weight$",
    r"^logit_scale$",
    r"(^|\.)embeddings\.position_ids$",
)


def _sam_block(placeholder: str, path: str) -> tuple[Row, ...]:
    key = f"image_encoder.blocks.{{{placeholder}}}"
    return (
        *_norm(f"{key}.norm1", f"{path}/attention_norm"),
        *_linear(f"{key}.attn.qkv", f"{path}/{{q,k,v}}"),
        *_linear(f"{key}.attn.proj", f"{path}/o"),
        Row(f"{key}.attn.rel_pos_h", f"{path}/rel_pos_h"),
        Row(f"{key}.attn.rel_pos_w", f"{path}/rel_pos_w"),
        *_norm(f"{key}.norm2", f"{path}/mlp_norm"),
        *_linear(f"{key}.mlp.lin1", f"{path}/up"),
        *_linear(f"{key}.mlp.lin2", f"{path}/down"),
    )


def _sam_attention(key: str, path: str) -> tuple[Row, ...]:
    parts = (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o"))
    return tuple(row for theirs, ours in parts for row in _linear(f"{key}.{theirs}", f"{path}/{ours}"))


def _sam_two_way(layer: str, path: str) -> tuple[Row, ...]:
    key = f"mask_decoder.transformer.layers.{layer}"
    return (
        *_sam_attention(f"{key}.self_attn", f"{path}/self_attention"),
        *_norm(f"{key}.norm1", f"{path}/self_norm"),
        *_sam_attention(f"{key}.cross_attn_token_to_image", f"{path}/token_to_image"),
        *_norm(f"{key}.norm2", f"{path}/token_norm"),
        *_linear(f"{key}.mlp.lin1", f"{path}/up"),
        *_linear(f"{key}.mlp.lin2", f"{path}/down"),
        *_norm(f"{key}.norm3", f"{path}/mlp_norm"),
        *_norm(f"{key}.norm4", f"{path}/image_norm"),
        *_sam_attention(f"{key}.cross_attn_image_to_token", f"{path}/image_to_token"),
    )


# facebook's segment-anything (sam_vit_{b,l,h}.pth, MedSAM); inside LISA and GLaMM behind a prefix.
SAM: tuple[Row, ...] = (
    Row("image_encoder.pos_embed", "sam_encoder/position_embedding", "squeeze"),
    *_conv("image_encoder.patch_embed.proj", "sam_encoder/patch"),
    *_sam_block("sam_windowed", "sam_encoder/stages/block/windowed/block"),
    *_sam_block("sam_whole", "sam_encoder/stages/block/whole"),
    Row("image_encoder.neck.0.weight", "sam_encoder/neck_in/kernel", "conv"),
    *_norm("image_encoder.neck.1", "sam_encoder/neck_in_norm"),
    Row("image_encoder.neck.2.weight", "sam_encoder/neck_out/kernel", "conv"),
    *_norm("image_encoder.neck.3", "sam_encoder/neck_out_norm"),
    Row("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "sam_prompt/gaussian"),
    Row("prompt_encoder.point_embeddings.{sam_point}.weight", "sam_prompt/point_embedding", "squeeze"),
    Row("prompt_encoder.not_a_point_embed.weight", "sam_prompt/not_a_point_embedding", "squeeze"),
    Row("prompt_encoder.no_mask_embed.weight", "sam_prompt/no_mask_embedding", "squeeze"),
    *_conv("prompt_encoder.mask_downscaling.0", "sam_prompt/mask_down1"),
    *_norm("prompt_encoder.mask_downscaling.1", "sam_prompt/mask_norm1"),
    *_conv("prompt_encoder.mask_downscaling.3", "sam_prompt/mask_down2"),
    *_norm("prompt_encoder.mask_downscaling.4", "sam_prompt/mask_norm2"),
    *_conv("prompt_encoder.mask_downscaling.6", "sam_prompt/mask_out"),
    Row("mask_decoder.iou_token.weight", "sam_decoder/iou_token", "squeeze"),
    Row("mask_decoder.mask_tokens.weight", "sam_decoder/mask_tokens"),
    *_sam_two_way("0", "sam_decoder/first"),
    *_sam_two_way("{sam_decoder_layer}", "sam_decoder/rest/block"),
    *_sam_attention("mask_decoder.transformer.final_attn_token_to_image", "sam_decoder/final_attention"),
    *_norm("mask_decoder.transformer.norm_final_attn", "sam_decoder/final_norm"),
    *_conv_transpose("mask_decoder.output_upscaling.0", "sam_decoder/upscale1"),
    *_norm("mask_decoder.output_upscaling.1", "sam_decoder/upscale_norm"),
    *_conv_transpose("mask_decoder.output_upscaling.3", "sam_decoder/upscale2"),
    *(
        row
        for i in range(3)
        for row in _linear(f"mask_decoder.output_hypernetworks_mlps.{{sam_mask}}.layers.{i}", f"sam_decoder/hyper/layer{i + 1}")
    ),
    *(row for i in range(3) for row in _linear(f"mask_decoder.iou_prediction_head.layers.{i}", f"sam_decoder/iou_head/layer{i + 1}")),
)

_LLAMA_LAYER = "model.layers.{llm_layer}"
_LLAMA_PROJECTIONS = (
    *((f"self_attn.{name}_proj", name) for name in "qkvo"),
    *((f"mlp.{name}_proj", name) for name in ("gate", "up", "down")),
)

# transformers' LlamaForCausalLM with the grounding tokens' rows appended, as a trained model is saved.
LLAMA: tuple[Row, ...] = (
    Row("model.embed_tokens.weight", "embedding/{base,grounding}"),
    Row(f"{_LLAMA_LAYER}.input_layernorm.weight", "llm/layers/block/attention_norm/scale"),
    *(Row(f"{_LLAMA_LAYER}.{theirs}.weight", f"llm/layers/block/{ours}/kernel", "linear") for theirs, ours in _LLAMA_PROJECTIONS),
    Row(f"{_LLAMA_LAYER}.post_attention_layernorm.weight", "llm/layers/block/mlp_norm/scale"),
    Row("model.norm.weight", "llm/norm/scale"),
    Row("lm_head.weight", "lm_head/{base,grounding}", "linear"),
)

# A buffer of old versions.
LLAMA_IGNORED = (r"rotary_emb\.inv_freq$",)


# --- reading the tables


def find_prefix(keys: Iterable[str], rows: Sequence[Row]) -> str:
    """What stands before the rows' keys in a file, such as "vision_model."; KeyMapError unless it is one thing."""
    probe = rows[0].key  # the first row of a table has no placeholder
    found = sorted({k.removesuffix(probe) for k in keys if k == probe or k.endswith(f".{probe}")})
    if len(found) != 1:
        what = "no key" if not found else f"{len(found)} keys ({', '.join(p + probe for p in found)})"
        raise KeyMapError(f"{what} in the checkpoint end in {probe!r}, exactly one should; give the checkpoint of that model alone")
    return found[0]


def with_prefix(rows: Sequence[Row], prefix: str) -> tuple[Row, ...]:
    return tuple(row._replace(key=prefix + row.key) for row in rows)


def _paths(row: Row) -> list[str]:
    """The row's paths: several where it holds a choice such as {q,k,v}."""
    choice = re.search(r"\{([^{}]*)\}", row.path)
    if choice is None:
        return [row.path]
    return [row.path.replace(choice[0], part) for part in choice[1].split(",")]


def _keys(row: Row, indices: Indices) -> np.ndarray:
    """Torch keys of the row, an array of str with the stack's leading axes (no axes without a placeholder)."""
    placeholder = re.search(r"\{(\w+)\}", row.key)
    if placeholder is None:
        return np.array(row.key, dtype=object)
    if placeholder[1] not in indices:
        raise KeyMapError(f"row {row.key!r}: unknown placeholder {placeholder[0]}; known are {', '.join(sorted(indices))}")
    numbers = indices[placeholder[1]]
    keys = np.empty(numbers.shape, dtype=object)
    for at in np.ndindex(numbers.shape):
        keys[at] = row.key.replace(placeholder[0], str(numbers[at]))
    return keys


def _filled(leaves: Mapping[str, Any], rows: Sequence[Row], indices: Indices) -> Iterator[tuple[np.ndarray, list[str], list[tuple], Op]]:
    """(torch keys, paths, shape of each path's part in torch, op) of the rows whose parameters are in `leaves`."""
    unnamed = sorted(leaves.keys() - {path for row in rows for path in _paths(row)})
    if unnamed:
        raise KeyMapError(f"no row names the parameters {', '.join(unnamed)}; add rows to the key map")
    for row in rows:
        if row.op not in OPS:
            raise KeyMapError(f"row {row.key!r}: unknown op {row.op!r}; known are {', '.join(OPS)}")
        keys, paths, op = _keys(row, indices), _paths(row), OPS[row.op]
        absent = [path for path in paths if path not in leaves]
        if len(absent) == len(paths):
            continue
        if absent:
            raise KeyMapError(f"row {row.key!r} fills {', '.join(paths)}; the parameters lack {', '.join(absent)}")
        parts = []
        for path in paths:
            shape = leaves[path].shape
            if shape[: keys.ndim] != keys.shape:
                raise KeyMapError(f"parameter {path} {list(shape)} should be stacked {list(keys.shape)}; the configuration is another")
            parts.append(op.to_torch(np.broadcast_to(np.uint8(0), shape[keys.ndim :])).shape)  # of a view without memory
        yield keys, paths, parts, op


def torch_shapes(leaves: Mapping[str, Any], rows: Sequence[Row], indices: Indices) -> dict[str, tuple[int, ...]]:
    """{torch key: shape} of parameters {path: anything with a shape}. Rows of other parameters do not count;
    KeyMapError for a parameter that no row names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for keys, _, parts, _ in _filled(leaves, rows, indices):
        whole = parts[0] if len(parts) == 1 else (sum(part[0] for part in parts), *parts[0][1:])
        shapes.update(dict.fromkeys(keys.ravel().tolist(), whole))
    return shapes


def check(
    found: Mapping[str, Sequence[int]], rows: Sequence[Row], indices: Indices, leaves: Mapping[str, Any], ignored: Sequence[str] = ()
) -> None:
    """Raise one KeyMapError that lists every tensor that `leaves` {path: anything with a shape} needs and {key: shape}
    `found` lacks or has in another shape, and every tensor found that no row wants and no regex of `ignored` excuses."""
    wanted = torch_shapes(leaves, rows, indices)
    missing = sorted(wanted.keys() - found.keys())
    extra = sorted(k for k in found.keys() - wanted.keys() if not any(re.search(p, k) for p in ignored))
    shapes = [
        f"{k} {list(found[k])}, wanted {list(wanted[k])}" for k in sorted(wanted.keys() & found.keys()) if tuple(found[k]) != wanted[k]
    ]
    problems = [
        f"{len(listed)} {what}:\n  " + "\n  ".join(listed)
        for what, listed in (("missing", missing), ("left over", extra), ("of another shape", shapes))
        if listed
    ]
    if problems:
        raise KeyMapError("the checkpoint does not fit the configuration; tensors " + "\ntensors ".join(problems))


def import_leaves(
    tensors: Mapping[str, np.ndarray], rows: Sequence[Row], indices: Indices, leaves: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """(path, array) of every parameter in `leaves`, in the table's order; each torch tensor is read once. Call `check` first."""
    for keys, paths, shapes, op in _filled(leaves, rows, indices):
        ends = np.cumsum([shape[0] for shape in shapes])[:-1] if len(paths) > 1 else []
        made: list[np.ndarray] = []
        for at in np.ndindex(keys.shape):
            tensor = tensors[keys[at]]
            parts = np.split(tensor, ends) if len(paths) > 1 else [tensor]
            made = made or [np.empty(leaves[path].shape, tensor.dtype) for path in paths]
            for stacked, part in zip(made, parts, strict=True):
                stacked[at] = op.to_flax(part)
        yield from zip(paths, made, strict=True)


def import_state(
    tensors: Mapping[str, np.ndarray], rows: Sequence[Row], indices: Indices, leaves: Mapping[str, Any], ignored: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Torch tensors {key: array} -> parameters {path: array}, those of `leaves` {path: anything with a shape}, in the
    tensors' dtype; KeyMapError as `check` raises it."""
    check({key: np.shape(value) for key, value in tensors.items()}, rows, indices, leaves, ignored)
    return dict(import_leaves(tensors, rows, indices, leaves))


def export_tensors(leaves: Mapping[str, np.ndarray], rows: Sequence[Row], indices: Indices) -> Iterator[tuple[str, np.ndarray]]:
    """(torch key, array) of every row whose parameters are in `leaves`: views, contiguous only where the op keeps them so."""
    for keys, paths, _, op in _filled(leaves, rows, indices):
        for at in np.ndindex(keys.shape):
            parts = [op.to_torch(np.asarray(leaves[path])[at]) for path in paths]
            yield keys[at], parts[0] if len(parts) == 1 else np.concatenate(parts)


def export_state(leaves: Mapping[str, np.ndarray], rows: Sequence[Row], indices: Indices) -> dict[str, np.ndarray]:
    """Inverse of `import_state`: parameters {path: array} -> torch tensors {key: array}."""
    return dict(export_tensors(leaves, rows, indices))
