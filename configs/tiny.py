"""Every part of MIMO at a size that a laptop trains from scratch in minutes.

    mimo train --config configs/tiny.py --data data/phantom --workdir runs/a
"""

from mimo_jax.config import AlignerConfig, ClipConfig, Config, LlamaConfig, LoraConfig, ModelConfig, PromptConfig, SamConfig


def get_config() -> Config:
    config = Config(name="tiny", tokenizer="train")
    config.model = ModelConfig(
        clip=ClipConfig(image_size=64, patch_size=8, width=128, layers=4, heads=4, mlp_width=384, feature_layer=-1),
        prompt=PromptConfig(width=64),
        aligner=AlignerConfig(queries=8, blocks=2, width=128, heads=4, max_text=24),
        llm=LlamaConfig(vocab_size=1024, width=128, layers=4, heads=4, kv_heads=2, mlp_width=384, max_length=256),
        lora=LoraConfig(rank=0),
        sam=SamConfig(
            image_size=128,
            patch_size=8,
            width=128,
            layers=4,
            heads=4,
            window=8,
            global_every=2,
            decoder_width=64,
            decoder_heads=4,
            decoder_mlp_width=128,
            iou_head_width=64,
        ),
        seg_max=3,
        dtype="float32",
        frozen_dtype="float32",
        remat="none",
    )
    config.trainables = {r"^sam_prompt/": None, r"": 1.0}
    config.data.batch_size = 64
    config.data.samples_per_image = 4
    config.data.buckets = "64,96,128"
    config.data.system_prompt = ""
    config.train.steps = 2000
    config.train.learning_rate = 1e-3
    config.generate.max_new_tokens = 48
    return config
