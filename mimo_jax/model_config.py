"""The settings of the model's parts, as mutable dataclasses; sizes are in pixels or tokens as each comment says."""

import re
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

    def from_sam(self) -> bool:
        """Whether X_img is made of what SAM's encoder computes, without an encoder and an image of its own."""
        return False

    def tokens(self) -> int:
        """I, the length of X_img."""
        return self.grid() ** 2 + self.extra_tokens()

    def problems_with(self, sam: "SamConfig") -> Iterator[Problem]:
        """Settings that cannot run with those of SAM."""
        yield from ()

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
class SamFeaturesConfig(VisionConfig):
    """X_img from the features of SAM's encoder, averaged over the cells of a coarser grid; image and frame are SAM's."""

    kind: str = "sam"
    image_size: int = 1024  # SAM's
    width: int = 256  # of the features and the stages together
    cells: int = 16  # g, on a side
    # Stages of the encoder whose outputs follow the features on the channels: comma-separated numbers from 0, e.g. "1,2,3", into
    # `SamConfig.feature_maps`.
    stages: str = ""

    def grid(self) -> int:
        return self.cells

    def from_sam(self) -> bool:
        return True

    def stage_numbers(self) -> tuple[int, ...]:
        return tuple(int(number) for number in self.stages.split(",")) if self.stages else ()

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from _unless(self.resample == "bilinear", "resample", "must be bilinear, as SAM's image is resized")
        listed = all(number.strip().isdecimal() for number in self.stages.split(",")) if self.stages else True
        yield from _unless(listed, "stages", f"is {self.stages!r}; give numbers such as 1,2,3, or none")
        yield from _unless(self.cells >= 1, "cells", "must be at least 1")

    def problems_with(self, sam: "SamConfig") -> Iterator[Problem]:
        *stages, features = sam.feature_maps()
        numbers = self.stage_numbers()
        yield from _unless(self.image_size == sam.image_size, "image_size", f"is {self.image_size}; set it to SAM's, {sam.image_size}")
        yield from _unless(self.image_fit == sam.image_fit, "image_fit", f"is {self.image_fit!r}; set it to SAM's, {sam.image_fit!r}")
        remedy = f"is {self.stages!r}; SAM's encoder of kind {sam.kind} has {len(stages)} stages, name numbers below that, each once"
        yield from _unless(max(numbers, default=-1) < len(stages) and len(set(numbers)) == len(numbers), "stages", remedy)
        maps = [features, *(stages[number] for number in numbers)]
        uneven = [side for side, _ in maps if side % self.cells]
        yield from _unless(not uneven, "cells", f"is {self.cells}; set it to a divisor of {', '.join(map(str, uneven))}")
        width = sum(channels for _, channels in maps)
        yield from _unless(self.width == width, "width", f"is {self.width}; set it to {width}, the channels of features and stages")


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
    dropout: float = 0.0  # probability that an element of the input of A is zero, in training alone


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

    def feature_maps(self) -> tuple[tuple[int, int], ...]:
        """(side, width) of each of the encoder's feature maps, from its first stage to the features that the decoder attends to."""
        return ((self.grid(), self.decoder_width),)

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

    def feature_maps(self) -> tuple[tuple[int, int], ...]:
        return ((self.grid(), self.width),) * (self.layers // self.global_every) + super().feature_maps()

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from _unless(self.image_size % self.patch_size == 0, "patch_size", "must divide model.sam.image_size")
        yield from _unless(self.width % self.heads == 0, "heads", "must divide model.sam.width")
        yield from _unless(self.layers % self.global_every == 0, "global_every", "must divide model.sam.layers")


@dataclass
class TinyVitConfig(SamConfig):
    """SAM with TinyViT, of four stages: the first convolutional, the others of window attention. The defaults are LiteMedSAM;
    MobileSAM has image_size 1024, pixel_norm "imagenet" and patch_stride 2. Texts are four numbers, one for each stage."""

    kind: str = "tiny_vit"
    image_size: int = 256
    pixel_norm: str = "minmax"
    patch_stride: int = 1  # of each of the two convolutions before the first stage: 1 (1 x 1 pixels) or 2 (3 x 3 pixels)
    widths: str = "64,128,160,320"
    depths: str = "2,2,6,2"  # blocks
    heads: str = "2,4,5,10"  # not used by the first stage
    windows: str = "7,7,14,7"  # tokens on a side; not used by the first stage
    mlp_ratio: int = 4  # also how much wider the blocks of the first stage are inside
    # Of the convolution between two stages. TinyViT classifies images with 2, and SAM's variant has 1 where the width becomes 320.
    strides: str = "2,2,1"

    def stages(self, name: str) -> tuple[int, ...]:
        """The numbers of one of the texts. Raises ValueError if it is not a list of numbers."""
        return tuple(int(number) for number in getattr(self, name).split(","))

    def grids(self) -> tuple[int, ...]:
        """The side of each stage's feature map."""
        sides = [self.image_size // self.patch_stride**2]
        for stride in self.stages("strides"):
            sides.append(-(-sides[-1] // stride))
        return tuple(sides)

    def grid(self) -> int:
        return self.grids()[-1]

    def feature_maps(self) -> tuple[tuple[int, int], ...]:
        return (*zip(self.grids(), self.stages("widths"), strict=True), *super().feature_maps())

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from _unless(self.patch_stride in (1, 2), "patch_stride", f"is {self.patch_stride}; use 1 (LiteMedSAM) or 2 (MobileSAM)")
        malformed = False
        for name, count in (("widths", 4), ("depths", 4), ("heads", 4), ("windows", 4), ("strides", 3)):
            text = getattr(self, name)
            good = re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*", text) and text.count(",") == count - 1
            malformed |= not good
            yield from _unless(bool(good), name, f"is {text!r}; use {count} numbers above 0, separated by commas")
        if malformed:
            return
        divided = all(width % heads == 0 for width, heads in zip(self.stages("widths"), self.stages("heads"), strict=True))
        yield from _unless(divided, "heads", "must divide model.sam.widths, each its own")
        yield from _unless(self.image_size % self.patch_stride**2 == 0, "image_size", "must be a multiple of patch_stride squared")


def _unless(ok: bool, field: str, remedy: str) -> Iterator[Problem]:
    if not ok:
        yield field, remedy


# Section of `ModelConfig` -> kind -> the class of its settings. `models.registry` adds the kinds that are registered.
KINDS: dict[str, dict[str, type]] = {
    "vision": {"clip": ClipConfig, "sam": SamFeaturesConfig},
    "aligner": dict.fromkeys(("cross_attention", "none", "linear", "mlp"), AlignerConfig),
    "llm": {"llama": LlamaConfig},
    "sam": {"vit": SamVitConfig, "tiny_vit": TinyVitConfig},
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
