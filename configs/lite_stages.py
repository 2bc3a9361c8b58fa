"""`configs/lite.py` with the stages of SAM's encoder beside its features in what the language model sees; they are stored with them.

mimo train --config configs/lite_stages.py --init IMPORT --data DIR --workdir runs/lite_stages
"""

from configs import lite
from mimo_jax.config import Config
from mimo_jax.model_config import SamFeaturesConfig


def get_config() -> Config:
    config = lite.get_config()
    config.name = "lite_stages"
    config.model.vision = SamFeaturesConfig(image_size=256, width=256 + 128 + 160 + 320, cells=16, stages="1,2,3")
    return config
