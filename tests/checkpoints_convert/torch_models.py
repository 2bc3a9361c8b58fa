"""LISA, GLaMM and MIMO in PyTorch, with random weights: put together from transformers, peft and segment-anything.

Tests save these in the layouts of the original checkpoints, convert them, and hold our model against them. Everything is
float32, in eval mode and without gradients.

Axis letters: H W height and width of the original image, I image tokens, Dc width of CLIP, D width of the language model, V its
vocabulary, T tokens of a sequence, Q queries of X_q, L instruction tokens, P prompt tokens, Wp width of X_vis, W width of the aligner,
M keys, C width of SAM's features, g side of their grid, n masks.
"""

from __future__ import annotations

import abc
import copy
import functools
import math
from collections.abc import Sequence

import numpy as np
import peft
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mimo_jax.config import Config
from mimo_jax.model_config import GROUNDING_TOKENS, ClipConfig, LlamaConfig, ModelConfig, PromptConfig, SamVitConfig
from tests.models import oracles

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PROMPT_KINDS = 6


def clip_model(cfg: ClipConfig) -> transformers.CLIPVisionModel:
    config = transformers.CLIPVisionConfig(
        hidden_size=cfg.width, intermediate_size=cfg.mlp_width, num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads,
        image_size=cfg.image_size, patch_size=cfg.patch_size, hidden_act=cfg.activation, layer_norm_eps=cfg.eps,
    )  # fmt: skip
    return transformers.CLIPVisionModel(config)


def llama_model(cfg: LlamaConfig, vocab_rows: int) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=vocab_rows, hidden_size=cfg.width, intermediate_size=cfg.mlp_width, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, rms_norm_eps=cfg.eps, rope_theta=cfg.rope_theta,
        max_position_embeddings=cfg.max_length, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def sam_model(cfg: SamVitConfig) -> nn.Module:
    """segment-anything's `Sam`, as its `build_sam` makes it."""
    modeling = oracles.segment_anything()
    g = cfg.image_size // cfg.patch_size
    encoder = modeling.ImageEncoderViT(
        img_size=cfg.image_size, patch_size=cfg.patch_size, embed_dim=cfg.width, depth=cfg.layers, num_heads=cfg.heads,
        mlp_ratio=cfg.mlp_ratio, out_chans=cfg.decoder_width, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True, window_size=cfg.window, global_attn_indexes=range(cfg.global_every - 1, cfg.layers, cfg.global_every),
    )  # fmt: skip
    prompt = modeling.PromptEncoder(
        embed_dim=cfg.decoder_width, image_embedding_size=(g, g), input_image_size=(cfg.image_size, cfg.image_size), mask_in_chans=16
    )
    transformer = modeling.TwoWayTransformer(
        depth=cfg.decoder_layers, embedding_dim=cfg.decoder_width, mlp_dim=cfg.decoder_mlp_width, num_heads=cfg.decoder_heads
    )
    decoder = modeling.MaskDecoder(transformer_dim=cfg.decoder_width, transformer=transformer, iou_head_hidden_dim=cfg.iou_head_width)
    return modeling.Sam(encoder, prompt, decoder)


def longest_side(pixels: np.ndarray, side: int) -> Tensor:
    """uint8 [H, W, 3] -> float [3, h, w] in 0 .. 255: SAM's ResizeLongestSide, whose torchvision calls Pillow's bilinear filter."""
    height, width = pixels.shape[:2]
    scale = side * 1.0 / max(height, width)
    size = (int(width * scale + 0.5), int(height * scale + 0.5))
    return torch.tensor(np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))).permute(2, 0, 1).float()


class Oracle(abc.ABC):
    """What LISA, GLaMM and MIMO share. A subclass says in `embedded` how a prompt becomes the language model's input; its
    arguments are the `prompt` of the other methods.

    clip: CLIPVisionModel. llama: LlamaForCausalLM, whose `.model` holds the rest. sam: segment-anything's Sam."""

    seg_offset: int  # from a <SEG> to the position whose state asks for its mask

    def __init__(self, config: Config, vocab_rows: int, seed: int):
        m = self.config = config.model
        self.vision = oracles.randomised(clip_model(m.vision), seed).requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # SAM's position code is a buffer, drawn where it is made
            self.sam = sam_model(m.sam)
        self.llama = llama_model(m.llm, vocab_rows)
        self.llama_config = self.llama.config
        hidden, out = nn.Linear(m.llm.width, m.llm.width), nn.Linear(m.llm.width, m.sam.decoder_width)
        self.llama.model.text_hidden_fcs = nn.ModuleList([nn.Sequential(hidden, nn.ReLU(), out, nn.Dropout(0.0))])

    @abc.abstractmethod
    def embedded(self, pixels: np.ndarray, *prompt) -> Tensor:
        """The prompt up to where the answer begins -> [T, D]."""

    @abc.abstractmethod
    def clip_pixels(self, pixels: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] -> what CLIP sees, [1, 3, S, S]."""

    def patches(self, pixels: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] -> X_img [I, Dc]."""
        states = self.vision(self.clip_pixels(pixels), output_hidden_states=True).hidden_states[self.config.vision.feature_layer]
        return states[0] if self.config.vision.class_token else states[0, 1:]

    def sam_features(self, pixels: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] -> [C, g, g]."""
        return self.sam.image_encoder(self.sam.preprocess(longest_side(pixels, self.config.sam.image_size))[None])[0]

    def features(self, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        """uint8 [H, W, 3] -> X_img [I, Dc], SAM's features [C, g, g]."""
        return self.patches(pixels), self.sam_features(pixels)

    def embed(self, ids: Sequence[int]) -> Tensor:
        return self.llama.model.embed_tokens(torch.as_tensor(ids, dtype=torch.long))

    def hidden(self, x: Tensor) -> Tensor:
        """Embedded sequence [T, D] -> states after the final norm [T, D]."""
        return self.llama.model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]

    def logits(self, pixels: np.ndarray, *prompt) -> tuple[Tensor, Tensor]:
        """Logits [T, V], and the states after the final norm [T, D]."""
        hidden = self.hidden(self.embedded(pixels, *prompt))
        return self.llama.lm_head(hidden), hidden

    def greedy(self, pixels: np.ndarray, *prompt, new_tokens: int, eos_id: int) -> list[int]:
        """The likeliest token, one after the other without a cache: at most `new_tokens`, and none from `eos_id` on."""
        x, ids = self.embedded(pixels, *prompt), []
        for _ in range(new_tokens):
            token = int(self.llama.lm_head(self.hidden(x)[-1]).argmax())
            if token == eos_id:
                break
            ids.append(token)
            x = torch.cat([x, self.embed([token])])
        return ids

    def masks(self, pixels: np.ndarray, *prompt, answer_ids: Sequence[int], seg_id: int) -> Tensor:
        """Mask logits [n, H, W] of each <SEG> of the answer, in the original image; the mask is where they are positive."""
        x = self.embedded(pixels, *prompt)
        places = [len(x) + i + self.seg_offset for i, token in enumerate(answer_ids) if token == seg_id]
        if not places:
            return torch.zeros(0, *pixels.shape[:2])
        hidden = self.hidden(torch.cat([x, self.embed(answer_ids)]))
        text_embeds = self.llama.model.text_hidden_fcs[0](hidden[places])[:, None]  # [n, 1, C]
        nothing, dense = self.sam.prompt_encoder(None, None, None)  # [1, 0, C], no_mask_embed as [1, C, g, g]
        low_resolution, _ = self.sam.mask_decoder(
            image_embeddings=self.sam_features(pixels)[None],
            image_pe=self.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=torch.cat([nothing.expand(len(places), -1, -1), text_embeds], dim=1),
            dense_prompt_embeddings=dense.expand(len(places), -1, -1, -1),
            multimask_output=False,
        )
        content = longest_side(pixels, self.config.sam.image_size).shape[-2:]
        return self.sam.postprocess_masks(low_resolution, content, pixels.shape[:2])[:, 0]

    def vision_tower(self, root: str) -> dict[str, Tensor]:
        """CLIP's tensors as LLaVA keeps them: behind `root`, with transformers 4's "vision_model."."""
        return {f"{root}vision_tower.vision_tower.vision_model.{key}": value for key, value in self.vision.state_dict().items()}


class LisaOracle(Oracle):
    """LISA (`config.model.aligner.kind` "linear"), or GLaMM ("mlp" and `glamm`): the projected patches stand among the words, and a
    mask is asked for by the state that predicts its [SEG]. CLIP sees what its stock processor makes of the image.

    glamm: SAM goes by the name `grounding_encoder`, and some of the region encoder, which takes no part here, is there too."""

    seg_offset = -1

    def __init__(self, config: Config, vocab_rows: int, seed: int = 0, glamm: bool = False):
        super().__init__(config, vocab_rows, seed)
        inner, image, width = self.llama.model, config.model.vision.width, config.model.llm.width
        if config.model.aligner.kind == "mlp":
            inner.mm_projector = nn.Sequential(nn.Linear(image, width), nn.GELU(), nn.Linear(width, width))
        else:
            inner.mm_projector = nn.Linear(image, width)
        if glamm:
            inner.grounding_encoder = self.sam
            fuse = nn.ModuleDict({"input_conv": nn.ModuleList([nn.Conv2d(image + 2, image, 1)])})
            inner.region_encoder = nn.ModuleDict({"mlvl_fuse": fuse, "roi_align": nn.ModuleDict({"updims": nn.Linear(image, width)})})
        else:
            inner.visual_model = self.sam
        oracles.randomised(self.llama, seed + 1).requires_grad_(False)

    def state_dict(self, vision_tower: bool = False) -> dict[str, Tensor]:
        """The merged checkpoint; with CLIP's tensors, which LISA's releases lack, if `vision_tower`."""
        return self.llama.state_dict() | (self.vision_tower("model.") if vision_tower else {})

    def clip_pixels(self, pixels: np.ndarray) -> Tensor:
        side = self.config.vision.image_size
        processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        return processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]

    def embedded(self, pixels: np.ndarray, before_ids: Sequence[int], after_ids: Sequence[int]) -> Tensor:
        """Ids before and after the image -> [T, D], T = len(before_ids) + I + len(after_ids)."""
        return torch.cat([self.embed(before_ids), self.llama.model.mm_projector(self.patches(pixels)), self.embed(after_ids)])


class VisualPrompt(nn.Module):
    """MIMO's points, boxes and scribbles, and the position code that they share with the patches."""

    def __init__(self, cfg: PromptConfig, clip: ClipConfig):
        super().__init__()
        self.vision = clip
        self.fourier_basis = nn.Parameter(torch.empty(2, cfg.width // 2))
        self.kind = nn.Parameter(torch.empty(PROMPT_KINDS, cfg.width))
        step, side = clip.patch_size, clip.image_size
        centres = [[(side - 1) / 2] * 2] if clip.class_token else []
        centres += [[left + (step - 1) / 2, top + (step - 1) / 2] for top in range(0, side, step) for left in range(0, side, step)]
        self.register_buffer("centres", torch.tensor(centres), persistent=False)

    def positional_encoding(self, xy: Tensor) -> Tensor:
        """Pixels of the CLIP frame, integers being centres, [..., 2] -> [..., Wp]."""
        angle = 2 * math.pi * (2 * (xy + 0.5) / self.vision.image_size - 1) @ self.fourier_basis
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    def image_code(self) -> Tensor:
        """[I, Wp]: of each patch's centre, row by row; of the image's for the class token."""
        return self.positional_encoding(self.centres)

    def forward(self, xy: Tensor, kind: Tensor) -> Tensor:
        """xy [P, 2], kind [P], none of them 0 -> X_vis [P, Wp]."""
        return self.positional_encoding(xy) + self.kind[kind]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        """[..., M, W] -> [..., heads, M, W / heads]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x [..., Q, W], memory [..., M, W] -> [..., Q, W]."""
        q, k, v = self.split(self.q(x)), self.split(self.k(memory)), self.split(self.v(memory))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))


class AlignerBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.self_attention, self.cross_attention = Attention(width, heads), Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x [Q, W], memory [M, W] -> [Q, W]."""
        y = self.self_norm(x)
        x = x + self.self_attention(y, y)
        x = x + self.cross_attention(self.cross_norm(x), memory)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


def sinusoid(length: int, width: int) -> Tensor:
    """[L, D]: all sines, then all cosines."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(length)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :width]


class Aligner(nn.Module):
    """MIMO's aligner of the kind "cross_attention", for one turn. It is given only what is there, so that nothing needs a mask."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        width, heads, out = cfg.aligner.width, cfg.aligner.heads, cfg.llm.width
        self.image_norm, self.text_norm = nn.LayerNorm(cfg.vision.width, eps=1e-6), nn.LayerNorm(out, eps=1e-6)
        self.image, self.text, self.visual = (nn.Linear(i, width) for i in (cfg.vision.width, out, cfg.prompt.width))
        self.modality_embedding = nn.Parameter(torch.empty(3, width))
        self.null_prompt = nn.Parameter(torch.empty(width))
        self.turn_to_image = Attention(width, heads)
        self.queries = nn.Parameter(torch.empty(cfg.aligner.queries, width))
        self.blocks = nn.ModuleList(AlignerBlock(width, heads) for _ in range(cfg.aligner.blocks))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.project = nn.Linear(width, out)

    def forward(self, image: Tensor, image_code: Tensor, text: Tensor, visual: Tensor) -> Tensor:
        """image [I, Dc], image_code [I, Wp], text [L, D], visual [P, Wp], P = 0 where nothing is pointed at -> X_q [Q, D]."""
        type_image, type_text, type_visual = self.modality_embedding
        keys_image = self.image(self.image_norm(image)) + self.visual(image_code) + type_image
        keys_text = self.text(self.text_norm(text) + sinusoid(*text.shape)) + type_text
        keys_visual = (self.visual(visual) if len(visual) else self.null_prompt[None]) + type_visual
        keys_turn = torch.cat([keys_text, keys_visual])
        memory = torch.cat([keys_image, keys_turn + self.turn_to_image(keys_turn, keys_image)])
        x = self.queries
        for block in self.blocks:
            x = block(x, memory)
        return self.project(self.norm(x))


class MimoOracle(Oracle):
    """MIMO with LoRA by peft (rank 1 or more): X_q stands among the words, and a mask is asked for by the state of its <SEG> itself
    (`seg_state` "token"). CLIP sees the whole image, padded right and bottom (`image_fit` "pad").

    peft: the PeftModel around `llama`, to be saved as an adapter alone."""

    seg_offset = 0

    def __init__(self, config: Config, vocab_rows: int | None = None, seed: int = 0):
        """vocab_rows: the base's and the grounding tokens', unless given."""
        m = config.model
        super().__init__(config, vocab_rows or m.llm.vocab_size + len(GROUNDING_TOKENS), seed)
        inner = self.llama.model
        inner.visual_model, inner.aligner, inner.visual_prompt = self.sam, Aligner(m), VisualPrompt(m.prompt, m.vision)
        # By their whole names: SAM's decoder has a q_proj and a v_proj too.
        targets = rf"model\.layers\.\d+\.\w+\.({'|'.join(config.lora_targets())})_proj"
        lora = peft.LoraConfig(r=m.lora.rank, lora_alpha=m.lora.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
        self.peft = peft.get_peft_model(self.llama, lora)
        oracles.randomised(self.peft, seed + 1).requires_grad_(False)

    def state_dict(self, peft: bool = True, vision_tower: bool = False) -> dict[str, Tensor]:
        """A training checkpoint as peft >= 0.6 names its tensors, or, without `peft`, LoRA merged into a checkpoint like LISA's;
        with CLIP's tensors if `vision_tower`."""
        model = self.peft if peft else copy.deepcopy(self.peft).merge_and_unload()
        root = "base_model.model.model." if peft else "model."
        return model.state_dict() | (self.vision_tower(root) if vision_tower else {})

    def clip_pixels(self, pixels: np.ndarray) -> Tensor:
        side = self.config.vision.image_size
        resized = longest_side(pixels, side) / 255
        resized = (resized - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
        return F.pad(resized, (0, side - resized.shape[2], 0, side - resized.shape[1]))[None]

    def align(self, pixels: np.ndarray, instruction_ids: Sequence[int], prompt_xy: np.ndarray, prompt_kind: np.ndarray) -> Tensor:
        """One turn, as `embedded` takes it -> X_q [Q, D]."""
        xy, kind = torch.as_tensor(prompt_xy, dtype=torch.float32), torch.as_tensor(prompt_kind, dtype=torch.long)
        prompt, there = self.llama.model.visual_prompt, kind > 0
        text, visual = self.embed(instruction_ids), prompt(xy[there], kind[there])
        return self.llama.model.aligner(self.patches(pixels), prompt.image_code(), text, visual)

    def embedded(
        self,
        pixels: np.ndarray,
        instruction_ids: Sequence[int],
        prompt_xy: np.ndarray,
        prompt_kind: np.ndarray,
        ids: Sequence[int],
        query_index: Sequence[int],
    ) -> Tensor:
        """The only turn: instruction_ids [L] without padding, prompts [P, 2] in the CLIP frame and [P], kind 0 where there is
        none; ids and query_index [T] as `conversation.encode_user_turn` makes them -> [T, D]."""
        x_q = self.align(pixels, instruction_ids, prompt_xy, prompt_kind)
        index = torch.as_tensor(query_index, dtype=torch.long)
        return torch.where((index >= 0)[:, None], x_q[index.clamp(min=0)], self.embed(ids))
