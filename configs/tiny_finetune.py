"""Fine-tune all parts of a trained tiny model on your own images and masks: a manifest or a folder that `mimo data` wrote.

    mimo train --config configs/tiny_finetune.py --init runs/a --data my_data.jsonl --workdir runs/b

Images are augmented with small random rotations, shifts and intensity changes, but never flipped, because left and right must keep their
names. Questions of knowledge (III, IV) are omitted, because most of your entities are not in the knowledge base.
"""

from configs import tiny
from mimo_jax.config import Config


def get_config() -> Config:
    config = tiny.get_config()
    config.name = "tiny_finetune"
    config.tokenizer = ""  # use the tokenizer of --init
    config.data.augment = True
    config.data.weights = {"vqa": 1.0, "I": 2.0, "II": 2.0, "III": 0.0, "IV": 0.0}
    config.data.buckets = "64,128"  # names that are not in the tokenizer's corpus need several tokens
    config.train.steps = 600
    config.train.learning_rate = 1e-3
    # Half of the weights of `tiny`, chosen on validation: with those, fewer of the denied structures are truly absent.
    config.train.loss.bce, config.train.loss.dice, config.train.loss.attention_map = 1.0, 0.5, 1.0
    return config
