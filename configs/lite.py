"""A MIMO for a laptop, of trained parts: LiteMedSAM's TinyViT and mask decoder, and SmolLM2-135M-Instruct with LoRA. The language model
sees SAM's own features, pooled (`vision.kind` "sam"), so that an image is encoded once for words and masks.

    mimo convert import --config configs/lite.py --sam lite_medsam.pth --llm SmolLM2-135M-Instruct.Q4_1.gguf --out import
    mimo data encode --checkpoint import --data DIR
    mimo train --config configs/lite.py --init import --data DIR --workdir runs/lite

The encoder is frozen and its features are stored: about 2.1 MB an image. configs/lite_stages.py and configs/lite_vit.py are other
choices of what the language model sees.
"""

from configs.mimo_7b import TRAINABLES
from mimo_jax.config import Config
from mimo_jax.model_config import AlignerConfig, LlamaConfig, LoraConfig, ModelConfig, PromptConfig, SamFeaturesConfig, TinyVitConfig


def get_config() -> Config:
    config = Config(name="lite", trainables=dict(TRAINABLES))
    config.model = ModelConfig(
        vision=SamFeaturesConfig(image_size=256, width=256, cells=16),
        prompt=PromptConfig(width=128, max_tokens=12, scribble_points=6),
        aligner=AlignerConfig(queries=16, blocks=2, width=384, heads=6, max_text=32),
        llm=LlamaConfig(vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536, rope_theta=100000.0),
        lora=LoraConfig(rank=16, alpha=32.0, targets="q,k,v,o"),
        sam=TinyVitConfig(),
        max_segs=2,
        dtype="float32",  # a CPU multiplies matrices of bfloat16 more slowly
        frozen_dtype="float32",
        remat="none",
    )
    config.data.batch_size = 16
    config.data.samples_per_image = 2
    config.data.buckets = "48,64,128"  # a question with its answer and X_q has 40 tokens on average
    config.data.chat_template = "chatml"
    config.data.system_prompt = ""
    config.data.features = True
    config.train.steps = 800
    config.train.learning_rate = 5e-4
    config.train.warmup_steps = 50
    config.train.checkpoint_every = 50
    config.train.loss.dice = 1.0
    config.train.loss.attention_map = 2.0  # no pretrained vision tower knows where things are
    config.train.loss_chunk = 16  # answers are short
    config.generate.max_new_tokens = 64
    config.generate.batch_size = 8
    config.generate.cache_mb = 512
    return config
