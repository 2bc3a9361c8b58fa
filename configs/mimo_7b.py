"""MIMO at full size: CLIP ViT-H/14 (laion2B), Vicuna-7B v1.5 with LoRA, SAM ViT-H; the paper's recipe.

mimo train --config configs/mimo_7b.py --init IMPORT --data DIR --workdir runs/mimo_7b
"""

from mimo_jax.config import Config

# The paper: both image encoders, SAM's prompt encoder and the language model's base are frozen.
TRAINABLES = {
    r"^vision/": None,
    r"^prompt/": 1.0,
    r"^aligner/": 1.0,
    r"^llm/.*lora_[ab]$": 1.0,
    r"^llm/": None,
    r"^(embedding|lm_head)/base$": None,
    r"^(embedding|lm_head)/grounding$": 1.0,
    r"^seg_projection/": 1.0,
    r"^sam_encoder/": None,
    r"^sam_prompt/": None,
    r"^sam_decoder/": 1.0,
}


def get_config() -> Config:
    config = Config(name="mimo_7b", trainables=dict(TRAINABLES))
    config.data.batch_size = 40
    config.train.epochs = 3  # of 895K samples: 67,000 steps
    config.train.reference_batch_size = 40
    config.train.checkpoint_every = 1000
    return config
