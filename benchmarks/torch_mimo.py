"""MIMO in PyTorch for the benchmarks, trained as is usual there: transformers' CLIP and Llama with their SDPA attention, peft's LoRA,
segment-anything's encoder and decoder, and the aligner of the tests' oracle for whole batches.

Axis letters as in `models/mimo.py`: N images, B samples (B = N * K), R turns, T tokens, Q queries, L instruction tokens, P prompt tokens,
S <SEG> slots, I image tokens, J keys of a turn, W aligner width, D width of the language model, C width of SAM's features, g side of a
grid, M side of a mask, V vocabulary with the grounding tokens.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import numpy as np
import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoints_convert import name_map, rows  # noqa: E402
from mimo_jax import pathtree  # noqa: E402
from mimo_jax.config import Config  # noqa: E402
from mimo_jax.models import clip_vit, mimo, sam_encoder  # noqa: E402
from mimo_jax.parameters import multipliers  # noqa: E402
from mimo_jax.train.losses import DICE_EPS  # noqa: E402
from tests.checkpoints_convert import torch_models  # noqa: E402
from tests.checkpoints_convert.torch_models import sinusoid  # noqa: E402

LANGUAGE = (*rows.LLAMA, *rows.ALIGNER, *rows.PROMPT, *rows.SEG_PROJECTION)  # tables of the tensors in `TorchMimo.llama`
FEATURES = ("x_img", "sam_features")  # outputs of the frozen encoders, which can replace images


def normalise(pixels: Tensor, size: Tensor, mean: tuple, std: tuple) -> Tensor:
    """uint8 [N, H, H, 3] -> float [N, 3, H, H], zero outside the content `size` [N, 2] (height, width)."""
    x = (pixels.float() - pixels.new_tensor(mean, dtype=torch.float32)) / pixels.new_tensor(std, dtype=torch.float32)
    at = torch.arange(pixels.shape[1], device=pixels.device)
    inside = (at[:, None] < size[:, :1, None]) & (at < size[:, 1:, None])
    return (x * inside[..., None]).permute(0, 3, 1, 2)


class Aligner(torch_models.Aligner):
    """The oracle's parameters with a forward pass for all turns of a batch at once."""

    def forward(self, image: Tensor, image_code: Tensor, text: Tensor, text_mask: Tensor, visual: Tensor, visual_mask: Tensor):
        """image [N, I, Dc], image_code [I, Wp], text [B, L, D] and visual [B, P, Wp] with masks -> X_q [B, Q, D], attention_maps [B, I]."""
        n, b, device = len(image), len(text), text.device
        type_image, type_text, type_visual = self.modality_embedding
        null = torch.zeros_like(visual_mask)
        null[:, 0] = ~visual_mask.any(1)
        keys_image = self.image(self.image_norm(image)) + self.visual(image_code) + type_image
        keys_text = self.text(self.text_norm(text) + sinusoid(*text.shape[1:]).to(device)) + type_text
        keys_visual = torch.where(null[..., None], self.null_prompt, self.visual(visual)) + type_visual
        keys_turn = torch.cat([keys_text, keys_visual], 1)
        turns_of_image = keys_turn.reshape(n, -1, keys_turn.shape[-1])
        keys_turn = keys_turn + self.turn_to_image(turns_of_image, keys_image).reshape(keys_turn.shape)
        mask = torch.cat([text_mask, visual_mask | null], 1)
        mask = F.pad(mask, (image.shape[1], 0), value=True)[:, None, None]
        x = self.queries.expand(b, -1, -1)
        for block in self.blocks:
            y = block.self_norm(x)
            x = x + block.self_attention(y, y)
            y = block.cross_norm(x)
            x = x + self.cross(block.cross_attention, y, keys_image, keys_turn, mask)
            x = x + block.down(F.gelu(block.up(block.mlp_norm(x)), approximate="tanh"))
        return self.project(self.norm(x)), self.scores(self.blocks[-1].cross_attention, y, keys_image)

    @staticmethod
    def cross(attention: nn.Module, x: Tensor, keys_image: Tensor, keys_turn: Tensor, mask: Tensor) -> Tensor:
        """Attention of x [B, Q, W] over the keys of its image [N, I, W], projected once per image, and its own [B, J, W]."""
        copies = len(x) // len(keys_image)
        q = attention.split(attention.q(x))
        k, v = (
            torch.cat([attention.split(project(keys_image)).repeat_interleave(copies, 0), attention.split(project(keys_turn))], 2)
            for project in (attention.k, attention.v)
        )
        return attention.o(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))

    @staticmethod
    def scores(attention: nn.Module, x: Tensor, keys_image: Tensor) -> Tensor:
        """[B, I]: the attention logits of each image key, summed over heads and averaged over the tokens of x."""
        n, _, w = keys_image.shape
        q = attention.q(x.mean(1)).reshape(n, -1, w)
        return (q @ attention.k(keys_image).mT).flatten(0, 1) * (w // attention.heads) ** -0.5


class TorchMimo(nn.Module):
    """`forward` returns the training loss of a batch, as `train/losses.py` does. Trained parameters are float32, others `frozen_dtype`."""

    def __init__(self, config: Config, params: dict | None = None):
        """params: our parameters (a nested dict) to start from; without them, the libraries initialise the parameters."""
        super().__init__()
        m = self.config = config.model
        if m.aligner.kind != "cross_attention" or config.train.loss.mask_side:
            raise SystemExit("the torch model needs config.model.aligner.kind=cross_attention and config.train.loss.mask_side=0")
        self.loss, vocabulary = config.train.loss, m.llm.vocab_size + len(m.grounding_tokens())
        self.vision = torch_models.clip_model(m.vision)
        self.sam = torch_models.sam_model(m.sam)
        self.llama = torch_models.llama_model(m.llm, vocabulary)
        inner = self.llama.model
        inner.aligner, inner.visual_prompt = Aligner(m), torch_models.VisualPrompt(m.prompt, m.vision)
        hidden, out = nn.Linear(m.llm.width, m.llm.width), nn.Linear(m.llm.width, m.sam.decoder_width)
        inner.text_hidden_fcs = nn.ModuleList([nn.Sequential(hidden, nn.ReLU(), out)])
        for own in (inner.aligner, inner.visual_prompt):
            for value in own.parameters(recurse=False):
                nn.init.normal_(value)
        tables = [(self.vision, rows.CLIP), (self.sam, rows.SAM), (self.llama, LANGUAGE)]
        for module, table in tables if params else ():
            module.load_state_dict(self.exported(params, table))
        self.set_requires_grad(config, tables)
        if m.lora.rank:
            self.add_lora(config, params)
        if m.remat != "none":
            self.llama.gradient_checkpointing_enable({"use_reentrant": False})
        for value in self.parameters():
            value.data = value.data.to(torch.float32 if value.requires_grad else getattr(torch, m.frozen_dtype))

    def exported(self, params: dict, table: tuple[rows.Row, ...]) -> dict[str, Tensor]:
        """The table's torch tensors of our parameters."""
        paths = {path for row in table for path in name_map.paths_of(row)}
        ours = {path: leaf for path, leaf in pathtree.flatten(params).items() if path in paths}
        state = name_map.export_state(ours, table, name_map.layer_indices(self.config))
        return {key: torch.from_numpy(np.array(value)) for key, value in state.items()}

    def set_requires_grad(self, config: Config, tables: list) -> None:
        """Set requires_grad according to `config.trainables`; for the vocabulary only if all rows train (see `add_lora`)."""
        trains = multipliers(config, mimo.abstract(config)[1])
        for module, table in tables:
            values = dict(module.named_parameters())
            for row in table:
                chosen = all(trains[path] is not None for path in name_map.paths_of(row) if path in trains)
                for key in name_map.keys_of(row, name_map.layer_indices(self.config)).ravel():
                    if key in values:  # else a buffer
                        values[key].requires_grad_(chosen)

    def add_lora(self, config: Config, params: dict | None) -> None:
        """peft's LoRA, and the rows of the grounding tokens as its trainable tokens."""
        m, trained = config.model, [value for value in self.llama.parameters() if value.requires_grad]
        grounding = [m.llm.vocab_size + i for i in range(len(m.grounding_tokens()))]
        lora = peft.LoraConfig(
            r=m.lora.rank, lora_alpha=m.lora.alpha, task_type="CAUSAL_LM",
            target_modules=rf"model\.layers\.\d+\.\w+\.({'|'.join(config.lora_targets())})_proj",
            trainable_token_indices={"embed_tokens": grounding, "lm_head": grounding},
        )  # fmt: skip
        peft.get_peft_model(self.llama, lora)
        for value in trained:  # which peft has frozen
            value.requires_grad_(True)
        if params:
            values = {key.replace(".default", ""): value for key, value in self.llama.named_parameters()}
            for key, tensor in self.exported(params, rows.LORA).items():
                values[key].data.copy_(tensor)

    def counts(self) -> dict[str, int]:
        """Number of trained and frozen parameters, counted as in our model: SAM's positional encoding is a parameter, and the base rows
        that peft's trained rows replace are not counted."""
        trained = sum(value.numel() for value in self.parameters() if value.requires_grad)
        hidden = sum(value.numel() for key, value in self.named_parameters() if "trainable_tokens_delta" in key)
        code = self.sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.numel()
        return {"trained": trained, "frozen": sum(value.numel() for value in self.parameters()) - trained - hidden + code}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        m, inner = self.config, self.llama.model
        image, features = self.encode(batch)
        b = len(batch["input_ids"])
        ids, mask, xy, kind = (batch[key].flatten(0, 1) for key in ("instruction_ids", "instruction_mask", "prompt_xy", "prompt_kind"))
        code, visual = inner.visual_prompt.image_code(), inner.visual_prompt(xy, kind)
        x_q, attention_map = inner.aligner(image, code, inner.embed_tokens(ids), mask, visual, kind > 0)
        index = batch["query_index"]
        spliced = gather(x_q.reshape(b, -1, m.llm.width), index.clamp(min=0))
        x = torch.where((index >= 0)[..., None], spliced, inner.embed_tokens(batch["input_ids"]))
        hidden = inner(inputs_embeds=x, use_cache=False).last_hidden_state
        states = gather(hidden, batch["seg_index"] - int(m.seg_state == "predict"))
        masks, iou = self.segment(features, inner.text_hidden_fcs[0](states))
        return self.total(batch, self.llama.lm_head(hidden), masks, iou, attention_map)

    def encode(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """X_img [N, I, Dc] and SAM's features [N, C, g, g], without a graph where the encoders are frozen."""
        if FEATURES[0] in batch:
            image, features = (batch[key].view(torch.bfloat16).to(getattr(torch, self.config.dtype)) for key in FEATURES)
            return image, features.permute(0, 3, 1, 2)
        vision_mean, vision_std = clip_vit.MEAN, clip_vit.STD
        with frozen_or_not(self.vision):
            pixels = normalise(batch["vision_image"], batch["vision_size"], vision_mean, vision_std).to(self.vision.dtype)
            states = self.vision(pixels, output_hidden_states=True).hidden_states[self.config.vision.feature_layer]
            image = states if self.config.vision.class_token else states[:, 1:]
        with frozen_or_not(self.sam.image_encoder):
            pixels = normalise(batch["sam_image"], batch["sam_size"], sam_encoder.MEAN, sam_encoder.STD)
            return image, self.sam.image_encoder(pixels.to(self.sam.image_encoder.pos_embed.dtype))

    def segment(self, features: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """features [N, C, g, g], prompts [B, S, C] -> mask logits [B, S, M, M], predicted IoU [B, S]; all masks of an image in one call."""
        (n, *_), (b, s, c) = features.shape, prompts.shape
        code = self.sam.prompt_encoder.get_dense_pe()
        _, dense = self.sam.prompt_encoder(None, None, None)
        made = [
            self.sam.mask_decoder(of_image[None], code, sparse, dense.expand(len(sparse), -1, -1, -1), multimask_output=False)
            for of_image, sparse in zip(features, prompts.reshape(n, -1, 1, c), strict=True)
        ]
        masks, iou = (torch.stack(parts) for parts in zip(*made, strict=True))
        return masks.reshape(b, s, *masks.shape[-2:]).float(), iou.reshape(b, s).float()

    def total(self, batch: dict[str, Tensor], logits: Tensor, masks: Tensor, iou: Tensor, attention_map: Tensor) -> Tensor:
        cfg, weight = self.loss, batch["sample_weight"][:, None]
        tokens = (batch["loss_mask"] * weight)[:, 1:]
        ce = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none")
        loss = cfg.ce * (ce * tokens.flatten()).sum() / tokens.sum().clamp(min=1)

        target, segs = batch["masks"].float(), batch["seg_mask"] * weight
        inside = content(batch["sam_size"], self.config.sam.image_size, target)
        bce, dice = bce_and_dice(masks, target, inside)
        hard = (masks > 0).float() * inside
        inter = (hard * target).sum((-2, -1))
        true_iou = inter / (hard.sum((-2, -1)) + target.sum((-2, -1)) - inter).clamp(min=1)
        of_masks = cfg.bce * bce + cfg.dice * dice + cfg.iou * (iou - true_iou) ** 2
        loss = loss + (of_masks * segs).sum() / segs.sum().clamp(min=1)

        attention_maps = batch["attention_target_mask"] * weight
        attention_map = (
            attention_map[:, -batch["attention_target"][0, 0].numel() :].reshape(batch["attention_target"].shape).float()
        )  # without the class token
        target = batch["attention_target"].float()
        inside = content(batch["vision_size"], self.config.vision.image_size, target)
        mapped = sum(bce_and_dice(attention_map, target, inside)) * attention_maps
        return loss + cfg.attention_map * mapped.sum() / attention_maps.sum().clamp(min=1)


@contextlib.contextmanager
def frozen_or_not(module: nn.Module):
    """If `module` does not train, run it without a graph and in the dtype of its weights."""
    weight = next(module.parameters())
    device = weight.device.type
    with torch.set_grad_enabled(weight.requires_grad):
        with torch.autocast(device, enabled=weight.requires_grad and torch.is_autocast_enabled(device)):
            yield


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, D] at index [B, S] -> [B, S, D]."""
    return x.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))


def content(size: Tensor, frame_side: int, target: Tensor) -> Tensor:
    """1 in the cells of target [B, ., M, M] that the image covers, whose size in a frame is int [N, 2], else 0: [B, 1, M, M]."""
    side = target.shape[-1]
    rows, cols = (torch.arange(side, device=size.device) * frame_side < size[:, axis, None] * side for axis in (0, 1))
    inside = rows[:, None, :, None] & cols[:, None, None, :]
    return inside.repeat_interleave(len(target) // len(size), dim=0).float()


def bce_and_dice(logits: Tensor, target: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    bce = (bce * inside).sum((-2, -1)) / inside.sum((-2, -1))
    p = logits.sigmoid() * inside
    return bce, 1 - (2 * (p * target).sum((-2, -1)) + DICE_EPS) / (p.sum((-2, -1)) + target.sum((-2, -1)) + DICE_EPS)


def on_device(batch: dict[str, np.ndarray], device: str) -> dict[str, Tensor]:
    """The loader's arrays as torch tensors, with indices as int64."""
    tensors = {key: torch.from_numpy(value).to(device) for key, value in batch.items()}
    return {key: value.long() if value.dtype == torch.int32 else value for key, value in tensors.items()}


class Training:
    """The training step of the same recipe: gradients, clipping by the global norm, Adam."""

    def __init__(self, model: TorchMimo, config: Config, compiled: bool = False):
        t, self.device = config.train, next(model.parameters()).device.type
        self.trained = [value for value in model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=t.learning_rate, betas=(t.b1, t.b2), weight_decay=t.weight_decay, fused=True)
        self.clip_norm, self.dtype = t.max_grad_norm, getattr(torch, config.model.dtype)
        self.loss_of = torch.compile(model.train()) if compiled else model.train()

    def __call__(self, batch: dict[str, Tensor]) -> tuple[float, float]:
        """(loss, gradient norm) before the update."""
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss_of(batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()
