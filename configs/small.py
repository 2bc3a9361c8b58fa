"""MIMO for one accelerator: CLIP ViT-B/16, TinyLlama-1.1B with LoRA, SAM ViT-B. MedSAM's weights also fit, with
--config.model.sam.pixel_norm=minmax and --config.model.sam.image_fit=stretch, at import and in training.

mimo train --config configs/small.py --init IMPORT --data DIR --workdir runs/small
"""

from configs.mimo_7b import TRAINABLES
from mimo_jax.config import Config
from mimo_jax.model_config import AlignerConfig, ClipConfig, LlamaConfig, ModelConfig, SamVitConfig


def get_config() -> Config:
    config = Config(name="small", trainables=dict(TRAINABLES))
    config.model = ModelConfig(
        vision=ClipConfig(image_size=224, patch_size=16, width=768, layers=12, heads=12, mlp_width=3072, activation="quick_gelu"),
        aligner=AlignerConfig(queries=32, blocks=2, width=768, heads=12),
        llm=LlamaConfig(vocab_size=32000, width=2048, layers=22, heads=32, kv_heads=4, mlp_width=5632),
        sam=SamVitConfig(width=768, layers=12, heads=12, global_every=3),
    )
    config.data.batch_size = 16
    config.data.buckets = "128,256,512"
    return config
