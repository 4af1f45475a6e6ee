"""Several processes: who this one is, waiting for each other, summing up. One process needs none of it, and pays none.

The only file that asks torch.distributed or the launcher's environment (torchrun's). It imports nothing of the package.
"""

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist


def _launched(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def local_rank() -> int:
    """This process's number on its machine, from 0: also that of its GPU."""
    return _launched("LOCAL_RANK", 0)


def local_world() -> int:
    """The processes on this machine."""
    return _launched("LOCAL_WORLD_SIZE", 1)


def launched() -> bool:
    """Whether this is one of several processes, of this machine or others."""
    return _launched("WORLD_SIZE", 1) > 1


def launcher() -> str:
    """What starts this many processes on the command line."""
    return f"torchrun --nproc-per-node {local_world()}" if "LOCAL_WORLD_SIZE" in os.environ else "python"


def rank() -> int:
    """This process's number among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that speaks and writes."""
    return rank() == 0


@contextmanager
def process_group(device: torch.device):
    """Join the processes that torchrun started, if it did, and leave them at the end."""
    if launched():
        if device.type == "cuda":
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def first_alone():
    """The first process of each machine does what is inside before the others begin: what is made once, they find."""
    if dist.is_initialized() and local_rank():
        dist.barrier()
    yield
    if dist.is_initialized() and not local_rank():
        dist.barrier()


def sum_over_processes(tensor) -> torch.Tensor:
    """tensor, in place, summed over the processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def smallest_over_processes(tensor) -> torch.Tensor:
    """tensor, in place, with the smallest values of the processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


def largest_over_processes(number: int) -> int:
    """The largest of the processes' numbers, by way of the CPU, so that no GPU is waited for."""
    if not dist.is_initialized():
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def take_from_first(tensors):
    """Every tensor, in place, as the first process has it."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
