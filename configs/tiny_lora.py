"""Fine-tune a trained tiny model on your own data with LoRA: the base is frozen, LoRA and MIMO's own parts train.

mimo train --config configs/tiny_lora.py --init runs/a --data my_data --workdir runs/b
"""

from configs import tiny_finetune
from configs.mimo_7b import TRAINABLES
from mimo_jax.config import Config
from mimo_jax.model_config import LoraConfig


def get_config() -> Config:
    config = tiny_finetune.get_config()
    config.name = "tiny_lora"
    config.model.lora = LoraConfig(rank=8, alpha=8.0)
    config.trainables = dict(TRAINABLES)
    config.init.reinit = r"lora_[ab]$"
    return config
