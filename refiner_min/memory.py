"""Training in less memory: refined maps are computed again in the backward pass instead of being kept.

What a refinement keeps for its gradients is most of what a training step holds (refinement_bytes). It imports model.
"""

from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from refiner_min.model import RefinerConfig, RefinerViT


def refinement_bytes(config: RefinerConfig, of_a_number: int = 2) -> int:
    """Bytes a picture that the refinements of a published form (expansion, convolution, sharing) keep for the backward
    pass, and that recompute_maps saves; of_a_number: 2 in bf16. Of N x N each keeps, beside its input: E maps before
    and after BatchNorm and after ReLU6, of the expansion and of the convolution, and H before and after the skip."""
    tokens, heads = config.grid**2 + 1, config.heads
    return config.depth // 2 * (6 * heads * config.expand + 2 * heads) * tokens**2 * of_a_number


def kept_bytes(call) -> int:
    """What is kept for a backward pass through what call() returns, its inputs and weights included."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # held until all is counted, so that no place in memory is taken twice
    assert result is not None
    return sum(sizes.values())


def recompute_maps(network: RefinerViT):
    """From now on every refinement of the network keeps its input alone and computes the rest again when gradients are
    asked for: the same numbers, in less memory and more time."""
    for block in network.blocks:
        if block.attention.refinement is not None:
            refinement = block.attention.refinement
            refinement.forward = partial(  # nothing in it is random
                checkpoint, refinement.forward, use_reentrant=False, preserve_rng_state=False,
                context_fn=lambda refinement=refinement: (nullcontext(), statistics_kept(refinement)))


@contextmanager
def statistics_kept(network: nn.Module):
    """What BatchNorm counts within it, it counts on copies, which are then forgotten."""
    counted = [(module, dict(module._buffers)) for module in network.modules()]
    for module, buffers in counted:
        module._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in counted:
            module._buffers.update(buffers)
