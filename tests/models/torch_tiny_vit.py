"""TinyViT of MobileSAM and LiteMedSAM in PyTorch, as their papers describe it and with the names of their tensors; written for tests,
because both packages need timm and torchvision."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimo_jax.model_config import TinyVitConfig
from tests.models import oracles


class ConvBn(nn.Module):
    def __init__(self, inputs: int, outputs: int, side: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))


class Bottleneck(nn.Module):
    """1 x 1, depthwise 3 x 3, 1 x 1: a block of the first stage if `residual`, else the step between two stages."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int = 1, residual: bool = False):
        super().__init__()
        self.conv1, self.conv3 = ConvBn(inputs, hidden), ConvBn(hidden, outputs)
        self.conv2 = ConvBn(hidden, hidden, 3, stride, groups=hidden)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))
        return F.gelu(x + y) if self.residual else y


class Attention(nn.Module):
    """x [windows, w*w, D] -> the same."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        places = [(i, j) for i in range(window) for j in range(window)]
        self.index = torch.tensor([[abs(a - c) * window + abs(b - d) for c, d in places] for a, b in places])

    def forward(self, x: Tensor) -> Tensor:
        windows, tokens, width = x.shape
        packed = self.qkv(self.norm(x)).view(windows, tokens, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        made = F.scaled_dot_product_attention(*packed, attn_mask=self.attention_biases[:, self.index][None])
        return self.proj(made.transpose(1, 2).reshape(windows, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class Block(nn.Module):
    """x [N, D, g, g] -> the same."""

    def __init__(self, width: int, heads: int, window: int, ratio: int):
        super().__init__()
        self.attn, self.mlp, self.local_conv = Attention(width, heads, window), Mlp(width, ratio), ConvBn(width, width, 3, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        n, width, g, _ = x.shape
        w = self.attn.window
        pad = -g % w
        side = (g + pad) // w
        y = F.pad(x, (0, pad, 0, pad)).view(n, width, side, w, side, w).permute(0, 2, 4, 3, 5, 1)
        y = self.attn(y.reshape(n * side * side, w * w, width)).view(n, side, side, w, w, width)
        y = y.permute(0, 5, 1, 3, 2, 4).reshape(n, width, g + pad, g + pad)[:, :, :g, :g]
        x = self.local_conv(x + y)
        return x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample


class TinyVit(nn.Module):
    """pixels [N, 3, S, S] -> features [N, C, g, g]."""

    def __init__(self, cfg: TinyVitConfig):
        super().__init__()
        widths, depths, heads, windows = (cfg.stages(name) for name in ("widths", "depths", "heads", "windows"))
        s, c, ratio = cfg.patch_stride, cfg.decoder_width, cfg.mlp_ratio
        self.patch_embed = nn.Module()
        self.patch_embed.seq = nn.Sequential(
            ConvBn(3, widths[0] // 2, 2 * s - 1, s), nn.GELU(), ConvBn(widths[0] // 2, widths[0], 2 * s - 1, s)
        )
        stages = []
        for i, stride in enumerate((*cfg.stages("strides"), 0)):
            if i == 0:
                blocks = [Bottleneck(widths[0], ratio * widths[0], widths[0], residual=True) for _ in range(depths[0])]
            else:
                blocks = [Block(widths[i], heads[i], windows[i], ratio) for _ in range(depths[i])]
            stages.append(Stage(blocks, Bottleneck(widths[i], widths[i + 1], widths[i + 1], stride) if stride else None))
        self.layers = nn.ModuleList(stages)
        norm = oracles.segment_anything().common.LayerNorm2d
        self.neck = nn.Sequential(
            nn.Conv2d(widths[-1], c, 1, bias=False), norm(c), nn.Conv2d(c, c, 3, padding=1, bias=False), norm(c)
        )  # fmt: skip

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """What each stage returns, [N, D, g, g], then the features."""
        x, maps = self.patch_embed.seq(x), []
        for stage in self.layers:
            for block in stage.blocks:
                x = block(x)
            maps.append(x)
            x = stage.downsample(x) if stage.downsample is not None else x
        return [*maps, self.neck(x)]

    def forward(self, x: Tensor) -> Tensor:
        return self.feature_maps(x)[-1]


def random_tiny_vit(cfg: TinyVitConfig, seed: int = 0) -> TinyVit:
    """In eval mode, with random weights and statistics."""
    model = oracles.randomised(TinyVit(cfg), seed)
    generator = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0.0, 0.3, generator=generator)
            part.running_var.uniform_(0.2, 2.0, generator=generator)
    return model
