"""The settings of the model's parts, as mutable dataclasses; sizes are in pixels or tokens as each comment says."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

PIXEL_NORMS = ("imagenet", "minmax", "none")
GROUNDING_TOKENS = ("<p>", "</p>", "<SEG>")  # in this order, after the base vocabulary; see ModelConfig.grounding_tokens


Problem = tuple[str, str]  # (field of the part's own settings, what is wrong with it and the remedy)


@dataclass
class VisionConfig(ABC):
    """Settings that every vision tower has; `kind` names a row of `models.registry.VISION_TOWERS`."""

    kind: str
    image_size: int  # pixels on a side
    width: int  # D of X_img
    image_fit: str = "pad"  # "pad", "stretch" or "crop" to the square
    resample: str = "bilinear"  # or "bicubic" (CLIP's stock processor)

    @abstractmethod
    def grid(self) -> int:
        """g, patches on a side."""

    def extra_tokens(self) -> int:
        """Tokens of X_img before those of the patches, such as a class token."""
        return 0

    def tokens(self) -> int:
        """I, the length of X_img."""
        return self.grid() ** 2 + self.extra_tokens()

    def problems(self) -> Iterator[Problem]:
        """Settings that cannot run, judged without those of other parts."""
        yield from _unless(self.image_fit in ("pad", "stretch", "crop"), "image_fit", f"is {self.image_fit!r}; use pad, stretch or crop")
        yield from _unless(self.resample in ("bilinear", "bicubic"), "resample", f"is {self.resample!r}; use bilinear or bicubic")


@dataclass
class ClipConfig(VisionConfig):
    """CLIP's vision tower (frozen in MIMO)."""

    kind: str = "clip"
    image_size: int = 224
    patch_size: int = 14
    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp_width: int = 5120
    activation: str = "gelu"  # "gelu" (laion's ViT-H, exact) or "quick_gelu" (openai's)
    eps: float = 1e-5
    feature_layer: int = -2  # the hidden state that is X_img, as an index into [embeddings, layer 1 .. layer n]
    class_token: bool = False  # keep the class token as the first token of X_img

    def grid(self) -> int:
        return self.image_size // self.patch_size

    def extra_tokens(self) -> int:
        return int(self.class_token)

    def problems(self) -> Iterator[Problem]:
        yield from _unless(self.image_size % self.patch_size == 0, "patch_size", "must divide model.vision.image_size")
        yield from _unless(self.width % self.heads == 0, "heads", "must divide model.vision.width")
        yield from super().problems()
        known = ("gelu", "quick_gelu")
        yield from _unless(self.activation in known, "activation", f"is {self.activation!r}; use one of {', '.join(known)}")
        n = self.layers
        remedy = f"is {self.feature_layer}; use {-n - 1} to {n}, an index into [embeddings, layer 1 .. layer n]"
        yield from _unless(-n - 1 <= self.feature_layer <= n, "feature_layer", remedy)


@dataclass
class PromptConfig:
    """The visual prompt encoder: points, boxes and scribbles to X_vis [P, width]."""

    width: int = 256
    max_tokens: int = 16  # P: a point needs one, a box two, a scribble `scribble_points`
    scribble_points: int = 8


@dataclass
class AlignerConfig:
    """The Multi-modal Input Aligner; `kind` names a row of `models.registry.ALIGNERS`. The paper gives no sizes: these are our choice."""

    kind: str = "cross_attention"  # "none", "linear" and "mlp" use only max_text of the sizes below
    queries: int = 64  # Q, the length of X_q
    blocks: int = 4
    width: int = 1024
    heads: int = 16
    max_text: int = 64  # L, the maximum number of instruction tokens that the aligner reads

    def image_only(self) -> bool:
        """Whether this kind reads the image alone, neither the instruction nor prompts."""
        return self.kind in ("linear", "mlp")

    def has_attention_map(self) -> bool:
        """Whether this kind has a map of where in the image its queries attend."""
        return self.kind == "cross_attention"

    def query_tokens(self, image: int, prompts: int) -> int:
        """Q, the length of one turn's X_q for `image` image tokens and at most `prompts` prompt tokens."""
        return {"cross_attention": self.queries, "none": image + self.max_text + prompts}.get(self.kind, image)

    def problems(self) -> Iterator[Problem]:
        """Settings that cannot run, judged without those of other parts."""
        yield from _unless(self.width % self.heads == 0, "heads", "must divide model.aligner.width")


@dataclass
class LlmConfig:
    """Settings that every language model has; `kind` names a row of `models.registry.LANGUAGE_MODELS`. `vocab_size` is the size of the
    base vocabulary only; the grounding tokens follow it."""

    kind: str
    vocab_size: int
    width: int
    max_length: int = 2048  # tokens, X_q included
    quantization: str = ""  # of a loaded model, never of a checkpoint: "int8" or "int4", chosen when it is loaded for inference

    def tensor_parallel_heads(self) -> tuple[int, int]:
        """(query heads, KV cache heads), over which devices may split the model; (1, 1) if they may not."""
        return 1, 1

    def lora_names(self) -> tuple[str, ...]:
        """Names of the matrices that LoRA can be applied to."""
        return ()

    def quantized_inputs(self) -> tuple[int, ...]:
        """Input widths of the matrices that `quantize` stores as integers."""
        return ()

    def problems(self) -> Iterator[Problem]:
        """Settings that cannot run, judged without those of other parts."""
        remedy = 'is for inference only; leave it empty here and use --quantize int8 (in Python: Mimo.load(…, quantization="int8"))'
        yield from _unless(self.quantization == "", "quantization", remedy)


@dataclass
class LlamaConfig(LlmConfig):
    """Llama and models with its architecture: Vicuna, TinyLlama, SmolLM."""

    kind: str = "llama"
    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    mlp_width: int = 11008
    rope_theta: float = 10000.0
    eps: float = 1e-5

    def tensor_parallel_heads(self) -> tuple[int, int]:
        return self.heads, self.kv_heads

    def lora_names(self) -> tuple[str, ...]:
        return "q", "k", "v", "o", "gate", "up", "down"

    def quantized_inputs(self) -> tuple[int, ...]:
        return self.width, self.mlp_width

    def problems(self) -> Iterator[Problem]:
        yield from _unless(self.width % self.heads == 0, "heads", "must divide model.llm.width")
        yield from super().problems()
        yield from _unless(self.heads % self.kv_heads == 0, "kv_heads", "must divide model.llm.heads")


@dataclass
class LoraConfig:
    rank: int = 8  # 0 makes no parameters
    alpha: float = 8.0
    targets: str = "q,v"  # comma-separated names of matrices of the language model


@dataclass
class SamConfig(ABC):
    """Settings that every SAM has: those of its frame, prompt encoder and mask decoder; `kind` names a row of
    `models.registry.MASK_ENCODERS`, the image encoder."""

    kind: str
    image_size: int  # pixels, longest side
    image_fit: str = "pad"  # as SAM was trained, or "stretch" to the square
    # What the encoder's pixels are: "imagenet", minus mean and over deviation (those of the kind's row in `models.registry`), as SAM's;
    # "minmax", from 0 to 1 between the minimum and maximum of each image, as MedSAM's; "none", from 0 to 1 unchanged.
    pixel_norm: str = "imagenet"
    pe_dtype: str = "float32"  # of the positional encoding; LISA and GLaMM compute it in "bfloat16" and were trained with that
    decoder_width: int = 256
    decoder_layers: int = 2
    decoder_heads: int = 8
    decoder_mlp_width: int = 2048
    iou_head_width: int = 256

    @abstractmethod
    def grid(self) -> int:
        """g, the side of the features that the decoder attends to."""

    def problems(self) -> Iterator[Problem]:
        """Settings that cannot run, judged without those of other parts."""
        yield from _unless(self.image_fit in ("pad", "stretch"), "image_fit", f"is {self.image_fit!r}; use pad or stretch")
        known = ", ".join(PIXEL_NORMS)
        yield from _unless(self.pixel_norm in PIXEL_NORMS, "pixel_norm", f"is {self.pixel_norm!r}; use one of {known}")
        yield from _unless(self.pe_dtype in ("float32", "bfloat16"), "pe_dtype", f"is {self.pe_dtype!r}; use float32 or bfloat16")
        fits = self.decoder_width % (2 * self.decoder_heads) == 0
        yield from _unless(fits, "decoder_heads", "twice this must divide decoder_width")


@dataclass
class SamVitConfig(SamConfig):
    """SAM with the vision transformer of segment-anything (ViT-B, L and H; MedSAM)."""

    kind: str = "vit"
    image_size: int = 1024
    patch_size: int = 16
    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp_ratio: float = 4.0
    window: int = 14  # tokens
    global_every: int = 8  # each stage is (global_every - 1) windowed blocks and one global block

    def grid(self) -> int:
        return self.image_size // self.patch_size

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from _unless(self.image_size % self.patch_size == 0, "patch_size", "must divide model.sam.image_size")
        yield from _unless(self.width % self.heads == 0, "heads", "must divide model.sam.width")
        yield from _unless(self.layers % self.global_every == 0, "global_every", "must divide model.sam.layers")


def _unless(ok: bool, field: str, remedy: str) -> Iterator[Problem]:
    if not ok:
        yield field, remedy


# Section of `ModelConfig` -> kind -> the class of its settings. `models.registry` adds the kinds that are registered.
KINDS: dict[str, dict[str, type]] = {
    "vision": {"clip": ClipConfig},
    "aligner": dict.fromkeys(("cross_attention", "none", "linear", "mlp"), AlignerConfig),
    "llm": {"llama": LlamaConfig},
    "sam": {"vit": SamVitConfig},
}


@dataclass
class ModelConfig:
    vision: VisionConfig = field(default_factory=ClipConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    aligner: AlignerConfig = field(default_factory=AlignerConfig)
    llm: LlmConfig = field(default_factory=LlamaConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sam: SamConfig = field(default_factory=SamVitConfig)
    seg_state: str = "token"  # the state of <SEG> itself, or "predict": the one that predicts it (LISA)
    seg_position: str = "inside"  # "inside": <p>x<SEG></p>; "after": <p> x </p> <SEG> (GLaMM); "bare": x <SEG> (LISA)
    max_turns: int = 1  # user turns in one training sample
    max_segs: int = 4  # S_max, <SEG> slots in one training sample
    dtype: str = "bfloat16"  # of activations
    frozen_dtype: str = "bfloat16"  # of parameters that do not train; trained ones are float32
    remat: str = "full"  # rematerialisation of the scanned layers: "none", "full" or "dots"
    unroll: bool = False  # unroll the loop over scanned layers in the compiled program; for small models on a CPU

    def query_tokens(self) -> int:
        """Q, the fixed number of positions of one turn's X_q in the sequence, for every kind of aligner."""
        return self.aligner.query_tokens(self.vision.tokens(), self.prompt.max_tokens)

    def grounding_tokens(self) -> tuple[str, ...]:
        """The tokens that follow the base vocabulary, in the order of their ids."""
        return ("<SEG>",) if self.seg_position == "bare" else GROUNDING_TOKENS

    def mask_side(self) -> int:
        """M, the side of the decoder's masks in pixels: four times that of SAM's features."""
        return 4 * self.sam.grid()
