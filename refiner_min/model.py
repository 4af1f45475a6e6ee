"""Refiner-ViT, all of it in this single file; it imports torch and torchvision.ops only.

A vision transformer whose attention maps are refined before they gather the values: the maps of the H heads are
expanded to E maps, each is convolved locally, and they are reduced to H again.
    paper:      "Refiner: Refining Self-attention for Vision Transformers", Zhou et al. 2021, arXiv:2106.03714
    published:  https://github.com/zhoudaquan/Refiner_ViT; this code was written anew and gives its numbers
Shapes: B images, N tokens (the class token first), C channels, H heads, E expanded heads, K classes.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation, StochasticDepth


@dataclass(frozen=True)
class RefinerConfig:
    """What a Refiner-ViT is made of; the defaults are the published model S. What cannot be is a ValueError."""
    img_size: int = 224  # pixels a side
    patch_size: int = 16  # pixels a side; even, because the stem's first convolution has stride 2
    in_channels: int = 3
    num_classes: int = 1000
    dim: int = 384  # C
    depth: int = 16  # blocks
    heads: int = 12  # H
    mlp_ratio: float = 3.0  # the MLP's hidden channels over C
    refine: bool = True  # False: a plain ViT with the same stem, depth and width
    share: bool = True  # blocks alternate own map / shared refined map, as published; False: each refines its own
    expand: int = 3  # E / H; 1: no expansion
    kernel_size: int = 3  # of the local convolution on the N x N map; 1: no convolution
    linear: bool = False  # True: the paper's linear operator, without BatchNorm, ReLU6 and skip; needs share=False
    unrefined: bool = False  # True: a pair's shared map is left as it is, to see what sharing alone does
    dense: bool = True  # a second head, on the patch tokens (token labeling)
    stem: tuple[int, int, int] = (32, 64, 128)  # channels of the stem's three convolutions
    layer_scale: float = 1e-5  # start of the learnable scale on the MLP's branch
    drop_path: float = 0.0  # stochastic depth: this rate at the last block, rising linearly from 0 at the first

    def __post_init__(self):
        for name in "img_size patch_size in_channels num_classes dim depth heads expand kernel_size".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for wrong, message in (
            (self.dim % self.heads, f"heads={self.heads} must divide dim={self.dim}"),
            (self.patch_size % 2, f"patch_size={self.patch_size} must be even: the stem halves the picture first"),
            (self.img_size % self.patch_size, f"patch_size={self.patch_size} must divide img_size={self.img_size}"),
            (self.kernel_size % 2 != 1, f"kernel_size={self.kernel_size} must be odd"),
            (not 0 <= self.drop_path < 1, f"drop_path={self.drop_path} must be at least 0 and below 1"),
            (self.refine and self.share and self.depth % 2, f"depth={self.depth} must be even: share=True makes pairs"),
            (self.linear and (self.share or not self.refine) or self.unrefined and not (self.share and self.refine),
             f"linear={self.linear}, unrefined={self.unrefined}: not with refine={self.refine}, share={self.share}"),
            (self.linear and self.expand == self.kernel_size == 1, "expand=1, kernel_size=1: linear=True does nothing"),
        ):
            if wrong:
                raise ValueError(message)

    @property
    def grid(self) -> int:  # patches a side: N = grid * grid + 1
        return self.img_size // self.patch_size


class Stem(nn.Sequential):
    """Pictures to patches: (B, in_channels, S, S) -> (B, C, grid, grid). Source: published, PatchEmbed_cnn."""

    def __init__(self, config: RefinerConfig):
        first, second, third = config.stem
        patch = config.patch_size // 2  # its side once the first convolution has halved the picture
        super().__init__(
            Conv2dNormActivation(config.in_channels, first, 7, stride=2),  # (B, first, S/2, S/2)
            Conv2dNormActivation(first, second, 3),  # (B, second, S/2, S/2)
            Conv2dNormActivation(second, third, 3),  # (B, third, S/2, S/2)
            nn.Conv2d(third, config.dim, patch, stride=patch),  # (B, C, grid, grid)
        )


class Refinement(nn.Module):
    """Attention maps to refined attention maps: (B, H, N, N) -> (B, H, N, N).

    Published form, an inverted residual on the maps:  scale * BN(A + BN(W_r relu6(BN(w *_kxk relu6(BN(W_e A)))))).
    Linear form, the paper's:  W_r (w *_kxk (W_e A)).
    W_e expands H maps to E, w convolves each map with a kernel of its own, W_r reduces E maps to H. The rows of a
    refined map do not sum to one and may hold negative entries. Source: published, DLA and adapt_bn; the paper.
    """

    def __init__(self, config: RefinerConfig, scale: float = 1.0):
        super().__init__()
        heads, expanded, kernel = config.heads, config.heads * config.expand, config.kernel_size
        norm, relu6 = (None, None) if config.linear else (nn.BatchNorm2d, nn.ReLU6)
        conv = partial(Conv2dNormActivation, norm_layer=norm, activation_layer=relu6, bias=False)
        self.scale = scale
        self.expand = conv(heads, expanded, 1) if config.expand > 1 else nn.Identity()
        self.convolve = conv(expanded, expanded, kernel, groups=expanded) if kernel > 1 else nn.Identity()
        only_convolves = config.linear and config.expand == 1
        self.reduce = nn.Identity() if only_convolves else conv(expanded, heads, 1, activation_layer=None)
        self.norm = None if config.linear else nn.BatchNorm2d(heads)

    def forward(self, maps):
        expanded = self.expand(maps)  # (B, E, N, N)
        convolved = self.convolve(expanded)  # (B, E, N, N)
        reduced = self.reduce(convolved)  # (B, H, N, N)
        return reduced if self.norm is None else self.scale * self.norm(maps + reduced)


class AttentionMaps(NamedTuple):  # of one block, detached; None where it has no such stage
    raw: torch.Tensor  # (B, H, N, N): its own softmax and what was added to it, or the shared map
    expanded: torch.Tensor | None = None  # (B, E, N, N)
    convolved: torch.Tensor | None = None  # (B, E, N, N)
    refined: torch.Tensor | None = None  # (B, H, N, N): what gathers the values


class Attention(nn.Module):
    """Multi-head self-attention with refined maps: tokens (B, N, C) and the map handed to it -> the same two.

    own: it builds its map; else it takes the one handed to it. Source: published, Refined_Attention.
    """

    def __init__(self, config: RefinerConfig, own: bool, refined: bool):
        super().__init__()
        self.config, self.own = config, own
        self.scale = (config.dim // config.heads) ** -0.5
        self.refinement = Refinement(config, scale=1.0 if own else self.scale) if refined else None
        self.qkv = nn.Linear(config.dim, 3 * config.dim if own else config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def raw_map_and_values(self, x, handed):
        """The map before its refinement (B, H, N, N), softmax(q k^T scale) + scale * handed or the map handed to it,
        and the values (B, H, N, C/H)."""
        heads = self.config.heads
        *qk, v = self.qkv(x).unflatten(2, (-1, heads, x.shape[2] // heads)).permute(2, 0, 3, 1, 4)  # (B, H, N, C/H)
        if not self.own:
            return handed, v
        q, k = (x * self.scale**0.5 for x in qk)  # each times the root, as published
        raw = (q @ k.transpose(2, 3)).softmax(dim=3)  # (B, H, N, N)
        return (raw if handed is None else raw + self.scale * handed), v

    def forward(self, x, handed=None):
        raw, v = self.raw_map_and_values(x, handed)  # (B, H, N, N), (B, H, N, C/H)
        refined = self.refinement(raw) if self.refinement is not None else raw
        x = self.proj((refined @ v).transpose(1, 2).flatten(2))  # (B, H, N, C/H) -> (B, N, C)
        if self.config.linear or not self.config.refine:
            return x, None
        return x, raw if self.config.share else refined

    def maps(self, x, handed=None) -> AttentionMaps:
        """Every map that forward builds from the same input."""
        raw, _ = self.raw_map_and_values(x, handed)
        if self.refinement is None:
            return AttentionMaps(raw)
        expanded = self.refinement.expand(raw)  # (B, E, N, N); nn.Identity hands its input on
        convolved = self.refinement.convolve(expanded)  # (B, E, N, N)
        return AttentionMaps(raw, None if expanded is raw else expanded,
                             None if convolved is expanded else convolved, self.refinement(raw))


class MLP(nn.Module):
    """Two linear layers, GELU between, and a learnable scale per channel: (B, N, C) -> (B, N, C). Source: published."""

    def __init__(self, config: RefinerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.dim, int(config.dim * config.mlp_ratio))
        self.fc2 = nn.Linear(self.fc1.out_features, config.dim)
        self.scale = nn.Parameter(torch.full((config.dim,), config.layer_scale))

    def forward(self, x):
        return self.scale * self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each a residual branch: tokens (B, N, C) and the map handed to it -> the same two.

    With sharing, even blocks build a map and odd ones refine the map of the block before; without, every block
    builds and refines its own. A branch sees x / 2 and is added twice, as published.
    """

    def __init__(self, config: RefinerConfig, index: int):
        super().__init__()
        own = not (config.refine and config.share) or index % 2 == 0
        refined = config.refine and not config.unrefined and (not config.share or index % 2 == 1)
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attention = Attention(config, own, refined)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = MLP(config)
        self.drop_path = StochasticDepth(config.drop_path * index / max(config.depth - 1, 1), mode="row")

    def forward(self, x, handed=None):
        attended, handed = self.attention(self.norm1(x / 2), handed)
        x = x + 2 * self.drop_path(attended)
        return x + 2 * self.drop_path(self.mlp(self.norm2(x / 2))), handed


class RefinerOutput(NamedTuple):
    logits: torch.Tensor  # (B, K), from the class token
    token_logits: torch.Tensor | None  # (B, N-1, K), from the patch tokens; None without the dense head

    def combined(self):  # (B, K): what evaluation goes by
        return self.logits if self.token_logits is None else self.logits + self.token_logits.amax(dim=1) / 2


class RefinerViT(nn.Module):
    """Refiner-ViT: images (B, in_channels, S, S), normalised with mean 0.5 and deviation 0.5 -> logits (B, K)."""

    def __init__(self, config: RefinerConfig):
        super().__init__()
        self.config = config
        self.stem = Stem(config)
        self.class_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, config.dim), std=0.02))
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, config.grid**2 + 1, config.dim), std=0.02))
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.reset_classifier(config.num_classes)
        self.apply(self._init_weights)

    def _init_weights(self, module):  # convolutions and norms keep torch's defaults, as published
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        return module

    def embed(self, images, mix_box=None):
        """Images to tokens with their positions: (B, in_channels, S, S) -> (B, N, C)."""
        shape = (self.config.in_channels, self.config.img_size, self.config.img_size)
        if images.shape[1:] != shape:
            raise ValueError(f"images of shape {tuple(images.shape)}: it takes batches of {shape}")
        patches = self.stem(images).flatten(2).transpose(1, 2)  # (B, N-1, C), row by row
        if mix_box is not None:
            patches = swap_tokens(patches, mix_box)
        tokens = torch.cat([self.class_token.expand(patches.shape[0], -1, -1), patches], dim=1)  # (B, N, C)
        return tokens + self.position

    def forward_features(self, images, mix_box=None):
        """Images to the tokens after the last norm: (B, in_channels, S, S) -> (B, N, C)."""
        x, handed = self.embed(images, mix_box), None
        for block in self.blocks:
            x, handed = block(x, handed)
        return self.norm(x)

    def forward_head(self, tokens) -> RefinerOutput:
        """Both heads: tokens (B, N, C) -> class logits (B, K) and token logits (B, N-1, K), in either mode."""
        return RefinerOutput(self.head(tokens[:, 0]), self.token_head(tokens[:, 1:]) if self.config.dense else None)

    def forward(self, images, mix_box=None):
        """Evaluation: logits (B, K), the class token's plus half the largest of the patch tokens'.
        Training: RefinerOutput. Without the dense head, the class token's logits (B, K) in both.
        mix_box (row0, col0, row1, col1), a tuple or a tensor (4,), half open, on the token grid (MixToken): the tokens
        inside come from the reversed batch; token_logits are swapped back. ValueError: images of another shape."""
        output = self.forward_head(self.forward_features(images, mix_box))
        if self.config.dense and mix_box is not None:
            output = RefinerOutput(output.logits, swap_tokens(output.token_logits, mix_box))  # (B, K), (B, N-1, K)
        return output if self.config.dense and self.training else output.combined()

    @torch.no_grad()
    def attention_maps(self, images) -> list[AttentionMaps]:
        """The maps of every block, first to last. ValueError in training: it would change BatchNorm's statistics."""
        if self.training:
            raise ValueError("attention_maps is for evaluation: call model.eval() first")
        x, handed, maps = self.embed(images), None, []
        for block in self.blocks:
            maps.append(block.attention.maps(block.norm1(x / 2), handed))
            x, handed = block(x, handed)
        return maps

    def reset_classifier(self, num_classes: int):
        """Give the model new, untrained heads for another number of classes."""
        self.config = replace(self.config, num_classes=num_classes)
        heads = [self._init_weights(nn.Linear(self.config.dim, num_classes)).to(self.class_token) for _ in range(2)]
        self.head, self.token_head = heads[0], heads[1] if self.config.dense else None


def swap_tokens(tokens, box):
    """MixToken: swap the tokens inside box with the reversed batch's, (B, N-1, C). Source: arXiv:2104.10858."""
    side = round(tokens.shape[1] ** 0.5)
    row0, col0, row1, col1 = box
    index = torch.arange(side, device=tokens.device)
    rows, cols = (index >= row0) & (index < row1), (index >= col0) & (index < col1)  # (side,)
    inside = (rows[:, None] & cols).flatten()[:, None]  # (N-1, 1); a mask, so that one compiled graph takes any box
    return torch.where(inside, tokens.flip(0), tokens)  # (B, N-1, C)


def refiner_vit_ti(**overrides) -> RefinerViT:
    """Ours, for small pictures and CPUs: 2,133,560 parameters at 64 px with 10 classes."""
    small = dict(img_size=64, patch_size=8, stem=(16, 24, 32), dim=192, depth=6, heads=4)
    return RefinerViT(RefinerConfig(**small | overrides))


def refiner_vit_s(**overrides) -> RefinerViT:
    """Published S: 25,408,656 parameters at 224 px; published accuracy on ImageNet 83.6 % (README of the code)."""
    return RefinerViT(RefinerConfig(**dict(dim=384, depth=16, heads=12) | overrides))


def refiner_vit_m(**overrides) -> RefinerViT:
    """Published M: 55,450,932 parameters at 224 px; published accuracy on ImageNet 84.6 %."""
    return RefinerViT(RefinerConfig(**dict(dim=420, depth=32, heads=12) | overrides))


def refiner_vit_l(**overrides) -> RefinerViT:
    """Published L: 81,150,192 parameters at 224 px; published accuracy on ImageNet 84.9 %, at 448 px 86.0 %."""
    return RefinerViT(RefinerConfig(**dict(dim=512, depth=32, heads=16) | overrides))
