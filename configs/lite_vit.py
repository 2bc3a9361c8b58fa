"""`configs/lite.py` with a small vision transformer of its own for the language model, trained from scratch beside SAM's encoder, whose
features alone are stored.

mimo train --config configs/lite_vit.py --init IMPORT --data DIR --workdir runs/lite_vit
"""

from configs import lite
from mimo_jax.config import Config
from mimo_jax.model_config import ClipConfig


def get_config() -> Config:
    config = lite.get_config()
    config.name = "lite_vit"
    config.model.vision = ClipConfig(image_size=128, patch_size=8, width=192, layers=6, heads=3, mlp_width=768, feature_layer=-1)
    config.trainables[r"^vision/"] = 1.0
    config.init.sources[r"^vision/"] = "vision,joint,seed"
    return config
