"""The settings of a model's parts: mutable dataclasses; sizes are in pixels or tokens as each comment says."""

from dataclasses import dataclass, field

GROUNDING_TOKENS = ("<p>", "</p>", "<SEG>")  # in this order, after the base vocabulary; see ModelConfig.grounding_tokens


@dataclass
class ClipConfig:
    """CLIP's vision tower (frozen in MIMO)."""

    image_size: int = 224  # pixels
    patch_size: int = 14
    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp_width: int = 5120
    activation: str = "gelu"  # "gelu" (laion's ViT-H, exact) or "quick_gelu" (openai's)
    eps: float = 1e-5
    feature_layer: int = -2  # which hidden state is X_img, as an index into [embeddings, layer 1 .. layer n]
    class_token: bool = False  # keep the class token as X_img's first key
    image_fit: str = "pad"  # "pad", "stretch" or "crop" to the square
    resample: str = "bilinear"  # or "bicubic" (CLIP's stock processor)

    def grid(self) -> int:
        """g, patches on a side."""
        return self.image_size // self.patch_size

    def tokens(self) -> int:
        """I, the length of X_img."""
        return self.grid() ** 2 + int(self.class_token)


@dataclass
class PromptConfig:
    """The visual prompt encoder: points, boxes and scribbles to X_vis [P, width]."""

    width: int = 256
    max_tokens: int = 16  # P: a point takes one, a box two, a scribble `scribble_points`
    scribble_points: int = 8


@dataclass
class AlignerConfig:
    """The Multi-modal Input Aligner (its sizes are ours: the paper gives none)."""

    kind: str = "cross_attention"
    queries: int = 64  # Q, the length of X_q
    blocks: int = 4
    width: int = 1024
    heads: int = 16
    max_text: int = 64  # L, instruction tokens that the aligner reads

    def image_only(self) -> bool:
        """Whether this kind reads the image alone, neither the instruction nor prompts."""
        return self.kind in ("linear", "mlp")


@dataclass
class LlamaConfig:
    """The language model. `vocab_size` counts the base rows only; grounding tokens follow them."""

    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    mlp_width: int = 11008
    rope_theta: float = 10000.0
    eps: float = 1e-5
    max_length: int = 2048  # tokens, X_q included
    quantization: str = ""  # of the loaded model, never of a checkpoint: "int8" or "int4", chosen where it is loaded for inference


@dataclass
class LoraConfig:
    rank: int = 8  # 0 makes no parameters
    alpha: float = 8.0
    targets: str = "q,v"  # comma-separated, of q, k, v, o, gate, up, down


@dataclass
class SamConfig:
    """SAM's image encoder, prompt encoder and mask decoder."""

    image_size: int = 1024  # pixels, longest side
    image_fit: str = "pad"  # as SAM was trained, or "stretch" to the square
    patch_size: int = 16
    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp_ratio: float = 4.0
    window: int = 14  # tokens
    global_every: int = 8  # each stage is (global_every - 1) windowed blocks and one global block
    pe_dtype: str = "float32"  # of the position code; "bfloat16" as LISA and GLaMM compute it, and trained with it
    decoder_width: int = 256
    decoder_layers: int = 2
    decoder_heads: int = 8
    decoder_mlp_width: int = 2048
    iou_head_width: int = 256


@dataclass
class ModelConfig:
    vision: ClipConfig = field(default_factory=ClipConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    aligner: AlignerConfig = field(default_factory=AlignerConfig)
    llm: LlamaConfig = field(default_factory=LlamaConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sam: SamConfig = field(default_factory=SamConfig)
    seg_state: str = "token"  # the state of <SEG> itself, or "predict": the one that predicts it (LISA)
    seg_position: str = "inside"  # "inside": <p>x<SEG></p>; "after": <p> x </p> <SEG> (GLaMM); "bare": x <SEG> (LISA)
    max_turns: int = 1  # user turns in one training sample
    max_segs: int = 4  # S_max, <SEG> slots in one training sample
    dtype: str = "bfloat16"  # of activations
    frozen_dtype: str = "bfloat16"  # of parameters that do not train; trained ones are float32
    remat: str = "full"  # "none", "full" or "dots", of the scanned layers
    unroll: bool = False  # write scanned layers out in the compiled program; for small models on a CPU

    def query_tokens(self) -> int:
        """Q, the fixed number of positions that one turn's X_q takes in the sequence, whatever the aligner's kind."""
        image, a = self.vision.tokens(), self.aligner
        return {"cross_attention": a.queries, "none": image + a.max_text + self.prompt.max_tokens}.get(a.kind, image)

    def grounding_tokens(self) -> tuple[str, ...]:
        """The tokens that follow the base vocabulary, in the order of their ids."""
        return ("<SEG>",) if self.seg_position == "bare" else GROUNDING_TOKENS

    def mask_side(self) -> int:
        """M, the side of the decoder's masks in pixels: four per SAM patch."""
        return 4 * self.sam.image_size // self.sam.patch_size
