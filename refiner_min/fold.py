"""A trained model as a program that only infers: every BatchNorm is folded into the convolution beside it.

In evaluation a BatchNorm is a scale and a shift, both known. Those of the stem, the expansion, the local convolution
and the reduction go into the weights before them; the one after the skip scales and shifts both of its arms. What is
left computes the same numbers with less traffic through memory, compiles, and exports. Its convolutions have their
channels last in memory, which is faster in evaluation. It imports model.
"""

from copy import deepcopy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # nn.BatchNorm2d, or nn.SyncBatchNorm of several processes
from torch.nn.utils.fusion import fuse_conv_bn_eval

from refiner_min.model import Refinement, RefinerViT


class FoldedRefinement(nn.Module):
    """A published refinement in evaluation, with the same stages: maps (B, H, N, N) -> refined maps (B, H, N, N)."""

    def __init__(self, refinement: Refinement):
        super().__init__()
        self.expand, self.convolve = (fold_stage(stage) for stage in (refinement.expand, refinement.convolve))
        self.reduce, norm = fold_stage(refinement.reduce), refinement.norm
        scale = refinement.scale * norm.weight / (norm.running_var + norm.eps).sqrt()  # (H,)
        shift = refinement.scale * norm.bias - scale * norm.running_mean
        self.reduce.weight.mul_(scale[:, None, None, None])
        self.reduce.bias.mul_(scale).add_(shift)
        self.register_buffer("skip", scale[:, None, None])  # (H, 1, 1)

    def forward(self, maps):
        return torch.addcmul(self.reduce(self.convolve(self.expand(maps))), maps, self.skip)


def fold_stage(stage: nn.Module) -> nn.Module:
    """A convolution with its BatchNorm as one convolution with a bias, before what follows them; others as they are."""
    if not isinstance(stage, nn.Sequential) or len(stage) < 2 or not isinstance(stage[1], _BatchNorm):
        return stage
    convolution, norm, *rest = stage
    fused = fuse_conv_bn_eval(convolution, norm)
    return nn.Sequential(fused, *rest) if rest else fused


@torch.no_grad()
def fold(model: RefinerViT) -> RefinerViT:
    """A copy for inference without any BatchNorm; its logits and maps are the model's but for rounding. Running
    statistics are taken as they are now. The copy is in evaluation mode, wants no gradients, and has other parameters'
    names: it is for using, not for saving or training on."""
    folded = deepcopy(model).eval().requires_grad_(False)
    for index, stage in enumerate(folded.stem):
        folded.stem[index] = fold_stage(stage)
    for block in folded.blocks:
        refinement = block.attention.refinement
        if refinement is not None and refinement.norm is not None:
            block.attention.refinement = FoldedRefinement(refinement)
    for module in folded.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return folded
