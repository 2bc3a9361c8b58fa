"""Adapt the whole of a trained tiny model to images and masks of your own, a manifest or a folder that `mimo data` wrote.

    mimo train --config configs/tiny_finetune.py --init runs/a --data my_data.jsonl --workdir runs/b

Images are shifted, scaled and turned a little as they are drawn, never flipped: left and right keep their names. Questions of
knowledge (III, IV) are left out, for most names of your own are not in the knowledge base.
"""

from configs import tiny
from mimo_jax.config import Config


def get_config() -> Config:
    config = tiny.get_config()
    config.name = "tiny_finetune"
    config.tokenizer = ""  # that of --init
    config.data.augment = True
    config.data.weights = {"vqa": 1.0, "I": 2.0, "II": 2.0, "III": 0.0, "IV": 0.0}
    config.data.buckets = "64,128"  # names that the tokenizer has not met take several tokens
    config.train.steps = 600
    config.train.learning_rate = 1e-3
    return config
