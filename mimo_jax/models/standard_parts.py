"""Registers the package's own parts: one row for each `kind`; see `registry`."""

from __future__ import annotations

from mimo_jax.model_config import AlignerConfig, ClipConfig, LlamaConfig, SamFeaturesConfig, SamVitConfig, TinyVitConfig
from mimo_jax.models import aligner, clip_vit, llama, sam_encoder, sam_features, tiny_vit
from mimo_jax.models.registry import (
    AlignerKind,
    LanguageModel,
    MaskEncoder,
    VisionTower,
    register_aligner,
    register_language_model,
    register_mask_encoder,
    register_vision_tower,
)

register_vision_tower(
    "clip", VisionTower(ClipConfig, clip_vit.ClipVit, clip_vit.MEAN, clip_vit.STD, clip_vit.matmul_counts, component="clip")
)
register_vision_tower("sam", VisionTower(SamFeaturesConfig, sam_features.SamFeatures, None, None, sam_features.matmul_counts))

register_aligner(
    "cross_attention",
    AlignerKind(AlignerConfig, aligner.CrossAttentionAligner, aligner.cross_attention_counts, component="aligner"),
)
register_aligner("none", AlignerKind(AlignerConfig, aligner.ConcatAligner, aligner.concat_counts, component="aligner"))
register_aligner("linear", AlignerKind(AlignerConfig, aligner.LinearProjector, aligner.projector_counts, component="projector"))
register_aligner(
    "mlp",
    AlignerKind(AlignerConfig, aligner.MlpProjector, aligner.projector_counts, component="projector_mlp"),
)

register_language_model("llama", LanguageModel(LlamaConfig, llama.Llama, llama.matmul_counts, component="llama"))

register_mask_encoder(
    "vit",
    MaskEncoder(SamVitConfig, sam_encoder.SamEncoder, sam_encoder.MEAN, sam_encoder.STD, sam_encoder.matmul_counts, component="sam"),
)
register_mask_encoder(
    "tiny_vit",
    MaskEncoder(
        TinyVitConfig,
        tiny_vit.TinyVit,
        sam_encoder.MEAN,
        sam_encoder.STD,
        tiny_vit.matmul_counts,
        shardings={r"^sam_encoder/.*/qkv/kernel$": ("embed", "heads")},
        component="tiny_vit",
    ),
)
