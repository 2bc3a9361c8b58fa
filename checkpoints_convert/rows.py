"""Tables from torch tensors to parameters.

A row is (torch key, parameter path, op). A key may contain one placeholder, such as `{vision_layer}`: then the parameter is
stacked over its values (`name_map.layer_indices`). A path may contain one choice, such as `{q,k,v}`: then the
torch tensor packs those parameters along its first axis. Keys are written as `layouts.normalize_keys` returns them.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    key: str
    path: str
    op: str = "identity"


def linear(key: str, path: str) -> tuple[Row, Row]:
    return Row(f"{key}.weight", f"{path}/kernel", "linear"), Row(f"{key}.bias", f"{path}/bias")


def conv(key: str, path: str) -> tuple[Row, Row]:
    return Row(f"{key}.weight", f"{path}/kernel", "conv"), Row(f"{key}.bias", f"{path}/bias")


def conv_transpose(key: str, path: str) -> tuple[Row, Row]:
    return Row(f"{key}.weight", f"{path}/kernel", "conv_transpose"), Row(f"{key}.bias", f"{path}/bias")


def norm(key: str, path: str) -> tuple[Row, Row]:
    return Row(f"{key}.weight", f"{path}/scale"), Row(f"{key}.bias", f"{path}/bias")


_CLIP_LAYER = "encoder.layers.{vision_layer}"

# transformers' CLIPVisionModel as 5.x saves it; older files have the prefix "vision_model.".
CLIP: tuple[Row, ...] = (
    Row("embeddings.class_embedding", "vision/class_embedding"),
    Row("embeddings.patch_embedding.weight", "vision/patch/kernel", "conv"),
    Row("embeddings.position_embedding.weight", "vision/position_embedding"),
    *norm("pre_layrnorm", "vision/pre_norm"),
    *norm(f"{_CLIP_LAYER}.layer_norm1", "vision/layers/block/attention_norm"),
    *linear(f"{_CLIP_LAYER}.self_attn.q_proj", "vision/layers/block/q"),
    *linear(f"{_CLIP_LAYER}.self_attn.k_proj", "vision/layers/block/k"),
    *linear(f"{_CLIP_LAYER}.self_attn.v_proj", "vision/layers/block/v"),
    *linear(f"{_CLIP_LAYER}.self_attn.out_proj", "vision/layers/block/o"),
    *norm(f"{_CLIP_LAYER}.layer_norm2", "vision/layers/block/mlp_norm"),
    *linear(f"{_CLIP_LAYER}.mlp.fc1", "vision/layers/block/up"),
    *linear(f"{_CLIP_LAYER}.mlp.fc2", "vision/layers/block/down"),
    *norm("post_layernorm", "vision/post_norm"),
)

# Other keys of a CLIP file: the text tower, both projections, the temperature, and a buffer of old versions.
CLIP_IGNORED = (
    r"^text_model\.",
    r"^(visual|text)_projection\.weight$",
    r"^logit_scale$",
    r"(^|\.)embeddings\.position_ids$",
)


def _sam_block(placeholder: str, path: str) -> tuple[Row, ...]:
    key = f"image_encoder.blocks.{{{placeholder}}}"
    return (
        *norm(f"{key}.norm1", f"{path}/attention_norm"),
        *linear(f"{key}.attn.qkv", f"{path}/{{q,k,v}}"),
        *linear(f"{key}.attn.proj", f"{path}/o"),
        Row(f"{key}.attn.rel_pos_h", f"{path}/rel_pos_h"),
        Row(f"{key}.attn.rel_pos_w", f"{path}/rel_pos_w"),
        *norm(f"{key}.norm2", f"{path}/mlp_norm"),
        *linear(f"{key}.mlp.lin1", f"{path}/up"),
        *linear(f"{key}.mlp.lin2", f"{path}/down"),
    )


def _sam_attention(key: str, path: str) -> tuple[Row, ...]:
    parts = (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o"))
    return tuple(row for theirs, ours in parts for row in linear(f"{key}.{theirs}", f"{path}/{ours}"))


def _sam_two_way(layer: str, path: str) -> tuple[Row, ...]:
    key = f"mask_decoder.transformer.layers.{layer}"
    return (
        *_sam_attention(f"{key}.self_attn", f"{path}/self_attention"),
        *norm(f"{key}.norm1", f"{path}/self_norm"),
        *_sam_attention(f"{key}.cross_attn_token_to_image", f"{path}/token_to_image"),
        *norm(f"{key}.norm2", f"{path}/token_norm"),
        *linear(f"{key}.mlp.lin1", f"{path}/up"),
        *linear(f"{key}.mlp.lin2", f"{path}/down"),
        *norm(f"{key}.norm3", f"{path}/mlp_norm"),
        *norm(f"{key}.norm4", f"{path}/image_norm"),
        *_sam_attention(f"{key}.cross_attn_image_to_token", f"{path}/image_to_token"),
    )


# The image encoder of segment-anything (sam_vit_{b,l,h}.pth, MedSAM).
SAM_ENCODER: tuple[Row, ...] = (
    Row("image_encoder.pos_embed", "sam_encoder/position_embedding", "squeeze"),
    *conv("image_encoder.patch_embed.proj", "sam_encoder/patch"),
    *_sam_block("sam_windowed", "sam_encoder/stages/block/windowed/block"),
    *_sam_block("sam_global", "sam_encoder/stages/block/global_block"),
    Row("image_encoder.neck.0.weight", "sam_encoder/neck_in/kernel", "conv"),
    *norm("image_encoder.neck.1", "sam_encoder/neck_in_norm"),
    Row("image_encoder.neck.2.weight", "sam_encoder/neck_out/kernel", "conv"),
    *norm("image_encoder.neck.3", "sam_encoder/neck_out_norm"),
)
# SAM's prompt encoder and mask decoder, which are the same for every image encoder.
SAM_DECODER: tuple[Row, ...] = (
    Row("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "sam_prompt/gaussian"),
    Row("prompt_encoder.point_embeddings.{sam_point}.weight", "sam_prompt/point_embedding", "squeeze"),
    Row("prompt_encoder.not_a_point_embed.weight", "sam_prompt/not_a_point_embedding", "squeeze"),
    Row("prompt_encoder.no_mask_embed.weight", "sam_prompt/no_mask_embedding", "squeeze"),
    *conv("prompt_encoder.mask_downscaling.0", "sam_prompt/mask_down1"),
    *norm("prompt_encoder.mask_downscaling.1", "sam_prompt/mask_norm1"),
    *conv("prompt_encoder.mask_downscaling.3", "sam_prompt/mask_down2"),
    *norm("prompt_encoder.mask_downscaling.4", "sam_prompt/mask_norm2"),
    *conv("prompt_encoder.mask_downscaling.6", "sam_prompt/mask_out"),
    Row("mask_decoder.iou_token.weight", "sam_decoder/iou_token", "squeeze"),
    Row("mask_decoder.mask_tokens.weight", "sam_decoder/mask_tokens"),
    *_sam_two_way("0", "sam_decoder/first"),
    *_sam_two_way("{sam_decoder_layer}", "sam_decoder/rest/block"),
    *_sam_attention("mask_decoder.transformer.final_attn_token_to_image", "sam_decoder/final_attention"),
    *norm("mask_decoder.transformer.norm_final_attn", "sam_decoder/final_norm"),
    *conv_transpose("mask_decoder.output_upscaling.0", "sam_decoder/upscale1"),
    *norm("mask_decoder.output_upscaling.1", "sam_decoder/upscale_norm"),
    *conv_transpose("mask_decoder.output_upscaling.3", "sam_decoder/upscale2"),
    *(
        row
        for i in range(3)
        for row in linear(f"mask_decoder.output_hypernetworks_mlps.{{sam_mask}}.layers.{i}", f"sam_decoder/hyper/layer{i + 1}")
    ),
    *(row for i in range(3) for row in linear(f"mask_decoder.iou_prediction_head.layers.{i}", f"sam_decoder/iou_head/layer{i + 1}")),
)

# Inside LISA and GLaMM, these keys have a prefix.
SAM: tuple[Row, ...] = (*SAM_ENCODER, *SAM_DECODER)


def _conv_bn(key: str, path: str, op: str) -> tuple[Row, Row]:
    """A convolution with its BatchNorm, folded (`batch_norm`)."""
    return Row(f"{key}.c.weight", f"{path}/kernel", op), Row(f"{key}.bn.bias", f"{path}/bias")


def _conv_bns(key: str, path: str) -> tuple[Row, ...]:
    """1 x 1, depthwise and 1 x 1, in the first stage of TinyViT and between two stages."""
    names = (("conv1", "expand", "pointwise"), ("conv2", "depthwise", "depthwise"), ("conv3", "project", "pointwise"))
    return tuple(row for theirs, ours, op in names for row in _conv_bn(f"{key}.{theirs}", f"{path}/{ours}", op))


def _tiny_vit_stage(i: int) -> tuple[Row, ...]:
    key, path = f"image_encoder.layers.{i}.blocks.{{tiny_vit_{i}}}", f"sam_encoder/stage{i}/block"
    return (
        *norm(f"{key}.attn.norm", f"{path}/attention_norm"),
        *linear(f"{key}.attn.qkv", f"{path}/qkv"),
        Row(f"{key}.attn.attention_biases", f"{path}/position_bias"),
        *linear(f"{key}.attn.proj", f"{path}/o"),
        *_conv_bn(f"{key}.local_conv", f"{path}/depthwise", "depthwise"),
        *norm(f"{key}.mlp.norm", f"{path}/mlp_norm"),
        *linear(f"{key}.mlp.fc1", f"{path}/up"),
        *linear(f"{key}.mlp.fc2", f"{path}/down"),
    )


# The image encoder of MobileSAM and LiteMedSAM.
TINY_VIT: tuple[Row, ...] = (
    *_conv_bn("image_encoder.patch_embed.seq.0", "sam_encoder/patch", "conv"),
    *_conv_bn("image_encoder.patch_embed.seq.2", "sam_encoder/patch_out", "conv"),
    *_conv_bns("image_encoder.layers.0.blocks.{tiny_vit_0}", "sam_encoder/stage0/block"),
    *(row for i in (1, 2, 3) for row in _tiny_vit_stage(i)),
    *(row for i in (0, 1, 2) for row in _conv_bns(f"image_encoder.layers.{i}.downsample", f"sam_encoder/merge{i}")),
    Row("image_encoder.neck.0.weight", "sam_encoder/neck_in/kernel", "pointwise"),
    *norm("image_encoder.neck.1", "sam_encoder/neck_in_norm"),
    Row("image_encoder.neck.2.weight", "sam_encoder/neck_out/kernel", "conv"),
    *norm("image_encoder.neck.3", "sam_encoder/neck_out_norm"),
    *SAM_DECODER,
)
# The classifier that MobileSAM's encoder was distilled with.
TINY_VIT_IGNORED = (r"^image_encoder\.(norm_head|head)\.",)

_LLAMA_LAYER = "model.layers.{llm_layer}"
_LLAMA_PROJECTIONS = (
    *((f"self_attn.{name}_proj", name) for name in "qkvo"),
    *((f"mlp.{name}_proj", name) for name in ("gate", "up", "down")),
)

# transformers' LlamaForCausalLM. Its vocabulary is the base vocabulary, or ends with the rows of the grounding tokens.
_LLAMA_LAYERS: tuple[Row, ...] = (
    Row(f"{_LLAMA_LAYER}.input_layernorm.weight", "llm/layers/block/attention_norm/scale"),
    *(Row(f"{_LLAMA_LAYER}.{theirs}.weight", f"llm/layers/block/{ours}/kernel", "linear") for theirs, ours in _LLAMA_PROJECTIONS),
    Row(f"{_LLAMA_LAYER}.post_attention_layernorm.weight", "llm/layers/block/mlp_norm/scale"),
    Row("model.norm.weight", "llm/norm/scale"),
)
EMBEDDING_KEY, HEAD_KEY = "model.embed_tokens.weight", "lm_head.weight"


def vocabulary(rows: str) -> tuple[Row, ...]:
    """The rows of embedding and head: `rows` is "base", or "{base,grounding}" if both are packed into one tensor."""
    return Row(EMBEDDING_KEY, f"embedding/{rows}"), Row(HEAD_KEY, f"lm_head/{rows}", "linear")


LLAMA: tuple[Row, ...] = (*vocabulary("{base,grounding}"), *_LLAMA_LAYERS)


def without_grounding(table: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows of a language model whose embedding and head have the base vocabulary only."""
    return tuple(row._replace(path=row.path.replace("{base,grounding}", "base")) for row in table)


# A buffer of old versions.
LLAMA_IGNORED = (r"rotary_emb\.inv_freq$",)

# PEFT's adapter of the language model, for any of its projections.
LORA: tuple[Row, ...] = tuple(
    Row(f"{_LLAMA_LAYER}.{theirs}.lora_{half}.weight", f"llm/layers/block/{ours}/lora_{half.lower()}", "linear")
    for theirs, ours in _LLAMA_PROJECTIONS
    for half in "AB"
)

# open_clip's vision tower, which packs q, k and v.
_OPEN_LAYER = "transformer.resblocks.{vision_layer}"
CLIP_OPEN: tuple[Row, ...] = (
    Row("class_embedding", "vision/class_embedding"),
    Row("conv1.weight", "vision/patch/kernel", "conv"),
    Row("positional_embedding", "vision/position_embedding"),
    *norm("ln_pre", "vision/pre_norm"),
    *norm(f"{_OPEN_LAYER}.ln_1", "vision/layers/block/attention_norm"),
    Row(f"{_OPEN_LAYER}.attn.in_proj_weight", "vision/layers/block/{q,k,v}/kernel", "linear"),
    Row(f"{_OPEN_LAYER}.attn.in_proj_bias", "vision/layers/block/{q,k,v}/bias"),
    *linear(f"{_OPEN_LAYER}.attn.out_proj", "vision/layers/block/o"),
    *norm(f"{_OPEN_LAYER}.ln_2", "vision/layers/block/mlp_norm"),
    *linear(f"{_OPEN_LAYER}.mlp.c_fc", "vision/layers/block/up"),
    *linear(f"{_OPEN_LAYER}.mlp.c_proj", "vision/layers/block/down"),
    *norm("ln_post", "vision/post_norm"),
)
# Other keys of an open_clip file: the text tower and both projections.
CLIP_OPEN_IGNORED = (
    r"^(token_embedding\.weight|positional_embedding|text_projection|attn_mask)$",
    r"^(transformer|ln_final|text)\.",
    r"^visual\.proj$",
    r"^logit_(scale|bias)$",
)

# Parts of LISA and GLaMM: the image projector, and the projection of <SEG>.
PROJECTOR_LINEAR: tuple[Row, ...] = linear("model.mm_projector", "aligner/project")
PROJECTOR_MLP: tuple[Row, ...] = (
    *linear("model.mm_projector.0", "aligner/project"),
    *linear("model.mm_projector.2", "aligner/project_out"),
)
SEG_PROJECTION: tuple[Row, ...] = (
    *linear("model.text_hidden_fcs.0.0", "seg_projection/hidden"),
    *linear("model.text_hidden_fcs.0.2", "seg_projection/out"),
)


def _attention(key: str, path: str) -> tuple[Row, ...]:
    return tuple(row for name in "qkvo" for row in linear(f"{key}.{name}", f"{path}/{name}"))


_BLOCK, _BLOCK_PATH = "model.aligner.blocks.{aligner_block}", "aligner/blocks/block"

# MIMO's own parts. The original names are not public, so these are our choice; a key map can give others.
ALIGNER: tuple[Row, ...] = (
    Row("model.aligner.modality_embedding", "aligner/modality_embedding"),
    *(Row(f"model.aligner.{name}", f"aligner/{name}") for name in ("null_prompt", "queries")),
    *(row for name in ("image", "text", "visual", "project") for row in linear(f"model.aligner.{name}", f"aligner/{name}")),
    *(row for name in ("image_norm", "text_norm", "norm") for row in norm(f"model.aligner.{name}", f"aligner/{name}")),
    *_attention("model.aligner.turn_to_image", "aligner/turn_to_image"),
    *(row for name in ("self_norm", "cross_norm", "mlp_norm") for row in norm(f"{_BLOCK}.{name}", f"{_BLOCK_PATH}/{name}")),
    *_attention(f"{_BLOCK}.self_attention", f"{_BLOCK_PATH}/self_attention"),
    *_attention(f"{_BLOCK}.cross_attention", f"{_BLOCK_PATH}/cross_attention"),
    *(row for name in ("up", "down") for row in linear(f"{_BLOCK}.{name}", f"{_BLOCK_PATH}/{name}")),
)
PROMPT: tuple[Row, ...] = tuple(Row(f"model.visual_prompt.{name}", f"prompt/{name}") for name in ("fourier_basis", "kind"))
