"""What a step of a model costs at the least, on this hardware: the floor beside which bench.py puts what it measures.

Operations and bytes are counted without running: matrix products and convolutions alone, each reading its operands and
writing its result once, as if all else were done on the way. It imports no other room.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry


def step(net: nn.Module, training: bool, images):
    """A forward pass; in training the backward pass of a mean of squares, too."""
    if not training:
        with torch.no_grad():
            net(images)
        return
    net.zero_grad()
    output = net(images)
    logits = [output] if isinstance(output, torch.Tensor) else [part for part in output if part is not None]
    sum(part.float().square().mean() for part in logits).backward()


class Traffic(TorchDispatchMode):
    """Counts the numbers that matrix products and convolutions read and write."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.numbers += sum(value.numel() for value in tree_leaves((args, kwargs, out))
                                if isinstance(value, torch.Tensor))
        return out


def count(build: Callable, shape: tuple, training: bool) -> tuple[int, int]:
    """Of a step on images of that shape: operations, a multiplication and an addition as two, and numbers moved."""
    with torch.device("meta"), FlopCounterMode(display=False) as operations, Traffic() as traffic:
        step(build().train(training), training, torch.empty(shape))
    return operations.get_total_flops(), traffic.numbers


def probes(device: torch.device) -> dict:
    """What measures the hardware, {name: (call, its operations or bytes)}: a matrix product a format, and a copy."""
    size = 8192 if device.type == "cuda" else 2048
    found = {str(dtype): (partial(torch.mm, *torch.randn(2, size, size, device=device).to(dtype)), 2 * size**3)
             for dtype in (torch.float32, torch.bfloat16)}
    source = torch.ones(2**26, device=device)
    return found | {"copy": (partial(torch.empty_like(source).copy_, source), 2 * source.nbytes)}


def least_seconds(counted: tuple[int, int], dtype: torch.dtype, rates: dict) -> float:
    """What the hardware needs for so many operations and numbers of that type, with its rates by the names of probes:
    whichever takes longer."""
    operations, numbers = counted
    return max(operations / rates[str(dtype)], numbers * dtype.itemsize / rates["copy"])
