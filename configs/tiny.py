"""All parts of MIMO at a size that a laptop can train from scratch in minutes.

mimo train --config configs/tiny.py --data data/phantom --workdir runs/a
"""

from mimo_jax.config import Config
from mimo_jax.model_config import AlignerConfig, ClipConfig, LlamaConfig, LoraConfig, ModelConfig, PromptConfig, SamVitConfig


def get_config() -> Config:
    config = Config(name="tiny", tokenizer="train")
    config.model = ModelConfig(
        vision=ClipConfig(image_size=96, patch_size=8, width=128, layers=3, heads=4, mlp_width=256, feature_layer=-1),
        prompt=PromptConfig(width=64, max_tokens=8, scribble_points=6),
        aligner=AlignerConfig(queries=8, blocks=2, width=128, heads=4, max_text=16),
        llm=LlamaConfig(vocab_size=1024, width=128, layers=3, heads=4, kv_heads=2, mlp_width=256, max_length=256),
        lora=LoraConfig(rank=0),
        sam=SamVitConfig(
            image_size=96,
            patch_size=8,
            width=128,
            layers=4,
            heads=2,
            mlp_ratio=2.0,
            window=6,
            global_every=2,
            decoder_width=64,
            decoder_heads=2,
            decoder_mlp_width=128,
            iou_head_width=64,
        ),
        max_segs=2,
        dtype="float32",
        frozen_dtype="float32",
        remat="none",
        unroll=True,
    )
    config.trainables = {r"^sam_prompt/": None, r"": 1.0}
    config.data.batch_size = 32
    config.data.samples_per_image = 4
    config.data.buckets = "56"
    config.data.system_prompt = ""
    config.train.optimizer = "muon"
    config.train.steps = 3000
    config.train.learning_rate = 2.5e-3
    config.train.warmup_steps = 50
    config.train.b2 = 0.98
    config.train.loss.dice = 1.0
    config.train.loss.attention_map = 2.0  # replaces what a pretrained CLIP would know
    config.train.log_every = 20
    config.generate.max_new_tokens = 48
    config.generate.batch_size = 32
    return config
