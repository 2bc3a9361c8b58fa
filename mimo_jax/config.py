"""Every setting of a run, as mutable dataclasses with one `validate()`.

Values are set in `configs/*.py:get_config()`; `mimo train --config configs/tiny.py --config.train.steps=500`
overrides any field by its path. The flag library (ml_collections) can override dataclass fields and dicts with named
entries, but not lists, so a list is a comma-separated string ("256,512,768"), which a method of `Config` parses. Sizes are in
pixels or tokens as each comment says.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field

from mimo_jax.chat_templates import CHAT_TEMPLATES, unknown_template
from mimo_jax.errors import UserError
from mimo_jax.model_config import KINDS, ModelConfig

PERSPECTIVES = ("vqa", "I", "II", "III", "IV")
PROMPTED = ("II", "IV")  # perspectives with visual prompts
MODALITIES = ("CT", "MR", "X-ray", "ultrasound", "fundus", "dermoscopy", "endoscopy", "pathology")
REMAT_POLICIES = ("none", "full", "dots")
PROMPT_KINDS = ("point", "box", "scribble")
FROZEN_SHARDINGS = ("auto", "replicated", "sharded")
QUANTIZATIONS = ("int8", "int4")  # storage formats of the language model's matrices for inference; see `quantize`


class ConfigError(UserError):
    """A setting that cannot work; the message names the field and the remedy."""


@dataclass
class SourceConfig:
    path: str = ""
    weight: float = 1.0
    perspectives: str = "vqa,I,II,III,IV"  # comma-separated: those that are taken from this source


@dataclass
class DataConfig:
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    # The paper's mixture. A perspective that no source has must have weight 0.
    weights: dict[str, float] = field(default_factory=lambda: {"vqa": 1.0, "I": 1.0, "II": 2.0, "III": 2.0, "IV": 1.0})
    split: str = "train"
    fraction: float = 1.0  # fraction of the patients or cases of every source; a larger fraction contains all of a smaller one
    prompt_kinds: str = "point,box,scribble"  # comma-separated: sampled in training with equal probability; evaluation samples all
    mixed_prompts: float = 0.3  # share of the prompts in training with a mark of another kind, or points outside, near or far
    batch_size: int = 8  # samples in the global batch
    samples_per_image: int = 1  # samples that share one image (and its encoding): of one perspective, or more if it has too few
    buckets: str = "256,512,768"  # comma-separated sequence lengths, tokens
    chat_template: str = "vicuna"  # text around the turns: a row of chat_templates.py
    system_prompt: str = "template"  # text before the first turn; "template": that of the chat template; empty: none
    image_tokens: str = ""  # two added tokens of the base vocabulary around X_q, e.g. "<im_start>,<im_end>" (LLaVA, LISA, GLaMM)
    augment: bool = False  # random rotation, scale, shift and intensity; a flip only where nothing has sides
    features: bool = False  # read the outputs of the frozen image encoders that `mimo data encode` wrote, instead of images
    seed: int = 0
    workers: int = 0  # Grain worker processes
    length_grouping: int = 8  # number of batches among which samples are sorted by length, so that few need a long bucket; 1: none
    cache_mb: int = 512  # memory for resized images and masks per process, MB; a dataset that fits is decoded once


@dataclass
class LossConfig:
    ce: float = 1.0
    bce: float = 2.0
    dice: float = 0.5
    iou: float = 0.1
    mask_side: int = 0  # pixels; side at which masks are compared, decoder masks are resized to it; 0: the decoder's own side
    attention_map: float = 0.0  # BCE + Dice of the aligner's attention map against the masks of the answer; not in the paper


@dataclass
class TrainConfig:
    steps: int = 10000
    epochs: float = 0.0  # passes over the training data, which determine `steps` when a run starts; 0: `steps` as given
    optimizer: str = "adam"  # or "muon": Muon for the towers' matrices, Adam for the rest
    learning_rate: float = 3e-4
    reference_batch_size: int = 0  # samples per step for which learning_rate was chosen; 0: not known
    warmup_steps: int = 100
    final_learning_rate: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    grad_accum_steps: int = 1  # micro-batches per step
    loss_chunk: int = 256  # tokens per sample whose logits exist at the same time
    loss: LossConfig = field(default_factory=LossConfig)
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    keep_last: int = 2  # newest checkpoints that are kept
    keep_every: int = 0  # also keep the checkpoints of steps that are multiples of this; 0: none
    max_skipped: int = 3  # consecutive steps with a non-finite loss or gradient that are skipped; one more stops the run
    spike_threshold: float = 6.0  # standard deviations above its running mean from which on a loss is logged in spikes.jsonl; 0: never
    heartbeat_timeout: int = 100  # seconds without a heartbeat after which another process counts as dead
    step_timeout: float = 3600.0  # seconds after which a step that does not finish ends a run of several processes; 0: never
    eval_every: int = 0  # 0: only at the end
    eval_samples: int = 64
    num_overlays: int = 8
    calibrate_samples: int = 512  # validation samples on which scores are calibrated at the end; 0: no calibration
    max_bad_samples: float = 0.01  # largest fraction of unusable samples; more stop the run
    wandb: str = ""  # W&B project that metrics are also sent to; empty: none


@dataclass
class MeshConfig:
    """How devices are arranged. Samples are split over slices, data and fsdp; -1: the remaining devices (for one axis at most)."""

    slices: int = 0  # TPU slices, between which only gradients are sent; 0: the number that the devices report
    data: int = 1
    fsdp: int = -1  # parameters are also split over this axis
    tensor: int = 1  # heads and MLP columns
    frozen_sharding: str = (
        "auto"  # the frozen base: "sharded" over fsdp, "replicated", or "auto": replicated if it takes half of the memory at most
    )


@dataclass
class GenerateConfig:
    max_new_tokens: int = 128
    batch_size: int = 16
    cache_mb: int = 4096  # features of open images and KV caches of chats that are kept on the device, MB
    refine: bool = False  # decode masks twice: SAM's decoder gets its first mask as the dense prompt
    zoom: bool = False  # decode small masks again, on a crop of the image around them
    sam_prompts: bool = False  # also give a turn's points, boxes and scribbles to SAM's prompt encoder, for every mask of the answer


@dataclass
class InitConfig:
    path: str = ""  # a run, a step, or an import; empty: initialise from the seed
    # Path regexes, joined by "|": parameters that are initialised from the seed if `path` lacks them or has them in another shape.
    reinit: str = ""
    # Where `mimo convert import` reads each group from: ordered path regex -> comma-separated sources, of which the first given one
    # that has any of the group is used; "seed": initialised from the seed.
    sources: dict[str, str] = field(
        default_factory=lambda: {
            r"^vision/": "vision,joint",
            r"^llm/.*/lora_[ab]$": "lora,joint,seed",
            r"^(llm/|(embedding|lm_head)/base$)": "llm,joint",
            r"^(embedding|lm_head)/grounding$": "llm,joint,seed",
            r"^aligner/": "joint,seed",
            r"^prompt/": "joint,seed",
            r"^seg_projection/": "joint,seed",
            r"^sam_": "sam,joint",
        }
    )


@dataclass
class Config:
    name: str = "mimo_7b"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    init: InitConfig = field(default_factory=InitConfig)
    # What trains: ordered path regex -> learning-rate multiplier; None freezes. The first match decides;
    # a parameter that no row matches is an error.
    trainables: dict[str, float | None] = field(default_factory=dict)
    freeze: str = ""  # a path regex: parameters that it matches do not train, regardless of `trainables`
    tokenizer: str = ""  # path of a tokenizer.json; "train": train one with `llm.vocab_size` ids on the corpus

    def validate(self) -> None:
        """Raise ConfigError, which names the field, for every combination that cannot run."""
        m, d = self.model, self.data

        def need(ok: bool, name: str, remedy: str) -> None:
            if not ok:
                raise ConfigError(f"config.{name}: {remedy}")

        for section in KINDS:
            part = getattr(m, section)
            known = settings_class(section, part.kind)
            wrong = f"is {part.kind!r}, which needs settings of class {known.__name__}, not {type(part).__name__}"
            need(type(part) is known, f"model.{section}.kind", wrong)
            for name, remedy in part.problems():
                need(False, f"model.{section}.{name}", remedy)
        for name, remedy in m.vision.problems_with(m.sam):
            need(False, f"model.vision.{name}", remedy)
        need(m.seg_state in ("token", "predict"), "model.seg_state", f"is {m.seg_state!r}; use token or predict")
        need(m.seg_position in ("inside", "after", "bare"), "model.seg_position", f"is {m.seg_position!r}; use inside, after or bare")
        need(m.remat in REMAT_POLICIES, "model.remat", f"is {m.remat!r}; use one of {', '.join(REMAT_POLICIES)}")
        need(m.lora.rank >= 0, "model.lora.rank", "must be 0 or more")
        need(0 <= m.lora.dropout < 1, "model.lora.dropout", "must be at least 0 and less than 1")
        names = m.llm.lora_names()
        unknown = ", ".join(sorted(set(self.lora_targets()) - set(names)))
        choice = f"use {', '.join(names)}" if names else f"a language model of kind {m.llm.kind} has no LoRA, so set model.lora.rank to 0"
        need(not unknown or not (names or m.lora.rank), "model.lora.targets", f"{unknown} unknown; {choice}")
        need(bool(self.trainables), "trainables", "is empty; list the parameters that train")
        need(set(d.weights) <= set(PERSPECTIVES), "data.weights", f"name only {', '.join(PERSPECTIVES)}")
        need(d.samples_per_image >= 1 and d.batch_size % d.samples_per_image == 0, "data.samples_per_image", "must divide data.batch_size")
        need(d.batch_size % self.train.grad_accum_steps == 0, "train.grad_accum_steps", "must divide data.batch_size")
        need(all(b <= m.llm.max_length for b in self.buckets()), "data.buckets", "must not exceed model.llm.max_length")
        need(not (d.features and d.augment), "data.features", "are of unchanged images; set data.augment=False, or data.features=False")
        need(0 < d.fraction <= 1, "data.fraction", f"is {d.fraction:g}; must be above 0 and at most 1")
        unknown_kinds = set(self.prompt_kinds()) - set(PROMPT_KINDS)
        some = bool(self.prompt_kinds()) and not unknown_kinds
        need(some, "data.prompt_kinds", f"is {d.prompt_kinds!r}; name some of {', '.join(PROMPT_KINDS)}")
        need(0 <= d.mixed_prompts <= 1, "data.mixed_prompts", f"is {d.mixed_prompts:g}; must be from 0 to 1")
        need(d.length_grouping >= 1, "data.length_grouping", "must be at least 1")
        need(d.chat_template in CHAT_TEMPLATES, "data.chat_template", unknown_template(d.chat_template))
        image_tokens = self.image_tokens()
        need(
            not image_tokens or (len(image_tokens) == 2 and all(image_tokens)),
            "data.image_tokens",
            f"is {d.image_tokens!r}; name two tokens, such as <im_start>,<im_end>, or none",
        )
        mapped = m.aligner.has_attention_map() and m.vision.image_fit != "crop"
        need(
            self.train.loss.attention_map == 0 or mapped,
            "train.loss.attention_map",
            "needs an aligner with an attention map, such as cross_attention, and vision.image_fit pad or stretch",
        )
        need(self.train.loss.mask_side >= 0, "train.loss.mask_side", "must be 0 or more")
        need(_is_regex(self.freeze), "freeze", f"is {self.freeze!r}; this is not a regular expression")
        need(self.train.optimizer in ("adam", "muon"), "train.optimizer", f"is {self.train.optimizer!r}; use adam or muon")
        need(self.train.steps >= 1, "train.steps", "must be at least 1")
        need(self.train.epochs >= 0, "train.epochs", "must be 0 or more")
        need(self.train.keep_last >= 1, "train.keep_last", "must be at least 1")
        need(self.train.keep_every >= 0, "train.keep_every", "must be 0 or more")
        need(self.train.max_skipped >= 0, "train.max_skipped", "must be 0 or more")
        need(self.train.heartbeat_timeout >= 1, "train.heartbeat_timeout", "must be at least 1")
        need(
            self.mesh.frozen_sharding in FROZEN_SHARDINGS,
            "mesh.frozen_sharding",
            f"is {self.mesh.frozen_sharding!r}; use one of {', '.join(FROZEN_SHARDINGS)}",
        )
        need(self.train.loss_chunk >= 1, "train.loss_chunk", "must be at least 1")

    def with_quantization(self, quantization: str) -> "Config":
        """The same config with the language model's matrices stored as `quantization`: "" as in the checkpoint, "int8" or "int4".
        Raises ConfigError for another name, or for a matrix that cannot be stored in that way."""
        if quantization not in ("", *QUANTIZATIONS):
            raise ConfigError(
                f"quantization: is {quantization!r}; use one of {', '.join(QUANTIZATIONS)}, or omit it for the checkpoint's own weights"
            )
        llm = self.model.llm
        inputs = llm.quantized_inputs()
        if quantization and not inputs:
            raise ConfigError(f"quantization: a language model of kind {llm.kind} has no matrices to store as integers; omit it")
        if quantization == "int4" and any(width % 2 for width in inputs):
            widths = " and ".join(map(str, inputs))
            raise ConfigError(f"quantization: int4 needs an even width and mlp_width, but they are {widths}; use int8")
        return dataclasses.replace(self, model=dataclasses.replace(self.model, llm=dataclasses.replace(llm, quantization=quantization)))

    def images(self) -> int:
        """N, the number of images in the global batch."""
        return self.data.batch_size // self.data.samples_per_image

    def buckets(self) -> tuple[int, ...]:
        """Sequence lengths in tokens, ascending."""
        try:
            return tuple(sorted(int(b) for b in self.data.buckets.split(",")))
        except ValueError:
            raise ConfigError(f"config.data.buckets: {self.data.buckets!r} is not a list of lengths such as 256,512") from None

    def system_prompt(self) -> str:
        """The text before the first turn; empty if there is none."""
        setting = self.data.system_prompt
        return CHAT_TEMPLATES[self.data.chat_template].system if setting == "template" else setting

    def image_tokens(self) -> tuple[str, ...]:
        """Names of the tokens before and after X_q; empty if there are none."""
        return tuple(t.strip() for t in self.data.image_tokens.split(",")) if self.data.image_tokens else ()

    def prompt_kinds(self) -> tuple[str, ...]:
        return tuple(kind.strip() for kind in self.data.prompt_kinds.split(",") if kind.strip())

    def target_side(self) -> int:
        """Side in pixels of the target masks in training."""
        return self.train.loss.mask_side or self.model.mask_side()

    def lora_targets(self) -> tuple[str, ...]:
        return tuple(t.strip() for t in self.model.lora.targets.split(",") if t.strip())

    def model_json(self) -> str:
        """Everything that a model's graph and shapes depend on, as a cache key."""
        return json.dumps(dataclasses.asdict(self.model))

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict) -> "Config":
        """Inverse of `to_dict`; raises ConfigError for an unknown field."""
        return _build(Config, values, "config")


def settings_class(section: str, kind: str) -> type:
    """The class that holds the settings of `config.model.<section>` of this kind; ConfigError for a kind that is not registered."""
    if kind not in KINDS[section]:
        known = ", ".join(KINDS[section])
        remedy = f"use one of {known}, or name the module that registers it in MIMO_PLUGINS"
        raise ConfigError(f"config.model.{section}.kind: is {kind!r}; {remedy}")
    return KINDS[section][kind]


def _is_regex(pattern: str) -> bool:
    try:
        return bool(re.compile(pattern))
    except re.error:
        return False


def _build(kind: type, values: dict, where: str):
    known = {f.name: f.type for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"{where}: unknown field {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    made = {}
    for name, value in values.items():
        if kind is ModelConfig and name in KINDS:
            default = next(iter(KINDS[name]))
            value = _build(settings_class(name, value.get("kind", default)), value, f"{where}.{name}")
        elif dataclasses.is_dataclass(known[name]):
            value = _build(known[name], value, f"{where}.{name}")
        elif known[name] == dict[str, SourceConfig]:
            value = {k: _build(SourceConfig, v, f"{where}.{name}.{k}") for k, v in value.items()}
        made[name] = value
    return kind(**made)
