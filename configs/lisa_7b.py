"""LISA's forward pass, so that its public checkpoints run: CLIP ViT-L/14, Llama-7B, SAM ViT-H, a linear projector.

    mimo train --config configs/lisa_7b.py --init IMPORT --data DIR --workdir runs/lisa_7b

The projected 256 patches of the image are X_q; points, boxes and scribbles are ignored. The number of base rows, all except that
of <SEG>, depends on the checkpoint: LLaVA and LISA add some to Llama's 32,000. Set --config.model.llm.vocab_size to that number.
"""

from mimo_jax.config import Config
from mimo_jax.model_config import AlignerConfig, ClipConfig, LlamaConfig, LoraConfig, ModelConfig

# LISA trains LoRA, all rows of embedding and head, the projection of <SEG> and SAM's mask decoder; LLaVA's projector is frozen.
TRAINABLES = {
    r"^vision/": None,
    r"^aligner/": None,
    r"^llm/.*lora_[ab]$": 1.0,
    r"^llm/": None,
    r"^(embedding|lm_head)/": 1.0,
    r"^seg_projection/": 1.0,
    r"^sam_encoder/": None,
    r"^sam_prompt/": None,
    r"^sam_decoder/": 1.0,
}


def get_config() -> Config:
    config = Config(name="lisa_7b", trainables=dict(TRAINABLES))
    config.model = ModelConfig(
        vision=ClipConfig(
            width=1024, layers=24, heads=16, mlp_width=4096, activation="quick_gelu", feature_layer=-2, image_fit="crop", resample="bicubic"
        ),
        aligner=AlignerConfig(kind="linear", queries=256),
        llm=LlamaConfig(eps=1e-6),  # its base is Vicuna v1.1, which is based on Llama 1
        lora=LoraConfig(rank=8, alpha=16.0, dropout=0.05),
        seg_state="predict",
        seg_position="bare",
    )
    config.model.sam.pe_dtype = "bfloat16"  # its fork of SAM computes the positional encoding in the dtype of the weights
    config.data.chat_template = "llava"
    config.data.image_tokens = "<im_start>,<im_end>"
    config.data.buckets = "384,512,768"
    config.data.weights = {"vqa": 1.0, "I": 1.0, "II": 0.0, "III": 2.0, "IV": 0.0}  # no prompts
    config.train.loss.iou = 0.0
    return config
