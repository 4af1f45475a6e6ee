"""Several processes: who this one is, waiting for each other, summing up. One process needs none of it, and pays none.

The only file that asks torch.distributed or the launcher's environment (torchrun's). It imports no other room.
"""

import os
import shlex
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from refiner_min import UserError

GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited",
        "Timed out waiting", "Connection refused")  # in what the backends say where a process has ended


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


def launcher(module: str) -> str:
    """What starts the module on the command line as it was started, with torchrun's own arguments."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return f"python -m {module}"
    try:  # torchrun is the process above this one; where it cannot be asked, the number of processes is known
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
        names = [Path(word).name for word in words]
        first = names.index("torchrun" if "torchrun" in names else "torch.distributed.run")
        return f"torchrun {shlex.join(words[first + 1: words.index(module) + 1])}"
    except (OSError, ValueError):
        return f"torchrun --nproc-per-node {local_world()} -m {module}"


def rank() -> int:
    """This process's number among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that speaks and writes."""
    return rank() == 0


def _meeting_place() -> dict:
    """Where the processes find each other. torchrun keeps one store over its restarts, in which the addresses of those
    that were killed still stand: on one machine each restart has a part of its own. (Machines count restarts apart, so
    for several TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is the way.)"""
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ or _launched("GROUP_WORLD_SIZE", 1) > 1:
        return {}
    store, rank, world = next(dist.rendezvous("env://"))
    return {"store": dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store), "rank": rank,
            "world_size": world}


@contextmanager
def process_group(device: torch.device):
    """Join the processes that torchrun started, if it did, and leave them at the end; not after a failure, when the
    others may wait in a step that this one will never take. UserError: another process is gone."""
    try:
        if launched():
            on_gpu = device.type == "cuda"
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", device_id=device if on_gpu else None,
                                    **_meeting_place())
        yield
    except RuntimeError as error:
        if launched() and any(word in str(error) for word in GONE):
            reason, here = str(error).splitlines()[0], f"{_launched('RANK', 0)} of {_launched('WORLD_SIZE', 1)}"
            raise UserError(f"process {here} has lost another one ({reason}): that one may have said "
                            f"why; --resume goes on from the last save") from None
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.2)  # gloo's threads let go of the last step's tensors: once Python is ending, that would abort it


@contextmanager
def first_alone():
    """The first process of each machine does what is inside before the others begin: what is made once, they find."""
    if local_rank():
        largest_over_processes(0)  # waits for all, by way of the CPU: a GPU's barrier gives up after ten minutes
    yield
    if not local_rank():
        largest_over_processes(0)


def from_first(make):
    """What make() gives in the first process, in all of them; its UserError, too."""
    if not dist.is_initialized():
        return make()
    found = [None]
    if is_main():
        try:
            found = [make()]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


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


def gathered(value) -> list:
    """The processes' values, the first one's first, of any type that can be pickled. They wait for each other."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def take_from_first(tensors):
    """Every tensor, in place, as the first process has it."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
