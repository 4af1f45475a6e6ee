"""What the machine offers and how it is set: the device, its number formats, its name, its cores. Commands ask here."""

import ctypes
import os
import platform
import re
import sys
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import nn

from refiner_min import UserError, distributed

try:
    import resource
except ImportError:  # Windows
    resource = None


def choose_device(name: str | None) -> torch.device:
    """The device of that name, ready to be worked on; None: a GPU if there is one, of several processes a GPU each.
    UserError: it cannot be used here, or holds no data, as "meta" does."""
    if distributed.launched() and name is not None and ":" in name:
        raise UserError(f"--device {name} would be that of every process: leave the number out, and each takes its own")
    if name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device("cpu" if name is None else name)
        torch.ones(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if device.type == "cpu":
            keep_freed_memory()
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0]})") from None
    return device


def keep_freed_memory():
    """From now on this process keeps what it frees, for what it asks for next; on Linux, where glibc is there.

    By default glibc gives every large piece back to the system and gets the next one page by page, each cleared: a
    training step of S at 224 px (batch 8, float32, two cores) has two million page faults, and 5 of its 13 seconds of
    processor time are the system's; so it has none. The process may hold more: 4.5 GB in the place of 3.4.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if option is not None:
        option(-4, 0)  # M_MMAP_MAX: no piece is mapped on its own
        option(-1, -1)  # M_TRIM_THRESHOLD: never


def hardware_amp(device: torch.device) -> str:
    """bf16 where it is faster than float32, else fp16 on a GPU and off on a CPU."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and bf16_pays() else "off"


@cache
def bf16_pays() -> bool:
    """Whether the CPU multiplies matrices faster in bf16 than in float32. That it has instructions for bf16 does not
    say so: a Xeon with AVX512-bf16 and no AMX takes twice as long."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")):
        return False
    half, single = product_seconds(torch.bfloat16, torch.float32)
    return half < single


def product_seconds(*dtypes: torch.dtype) -> list[float]:
    """The time of a matrix product on the CPU in each format, at its fastest; in turns, so that what else the machine
    does meanwhile slows none of them alone. (Without a GPU torch.utils.benchmark warns.)"""
    matrices, found = [torch.ones(1024, 1024, dtype=dtype) for dtype in dtypes], []
    for _ in range(16):
        found.append([])
        for matrix in matrices:
            started = time.perf_counter()
            torch.mm(matrix, matrix)
            found[-1].append(time.perf_counter() - started)
    return [min(times) for times in zip(*found)]


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Matrix products in that format: "bf16", "fp16" or "off"."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "off")


@contextmanager
def exact_float32():
    """Within it, a GPU's products and convolutions in float32 are just that: no TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def set_up_training(network: nn.Module, device: torch.device, amp: str) -> dict:
    """The settings that make training on a GPU faster, made here alone; what config.json says of them.

    TF32 where autocast is on, too: what autocast leaves in float32. cudnn measures which of its algorithms is fastest.
    Convolutions, on pictures and on attention maps, have their channels last in memory.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("highest" if amp == "off" else "high")
        torch.backends.cudnn.allow_tf32 = amp != "off"
        torch.backends.cudnn.benchmark = True
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
    return {"tf32": on_gpu and amp != "off", "tf32_in_evaluation": False, "cudnn_benchmark": on_gpu,
            "channels_last": on_gpu}


def widest_float(device: torch.device) -> torch.dtype:
    """To sum up in: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def model_name(device: torch.device) -> str:
    """What kind of device it is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name") or platform.machine()
    return name if device.type == "cpu" else f"{device.type}, {name}"


def describe(device: torch.device) -> str:
    """The hardware, for people."""
    return model_name(device) + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")


def peak_memory(device: torch.device) -> int:
    """The most bytes held at once so far: of a GPU by tensors, else by this process; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # getrusage counts the process, too, that this one was started by
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        return 1024 * int(found[1]) if found else 0  # a sandbox may not say
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource is not None else 0  # bytes on macOS


def restart_peak_memory(device: torch.device):
    """From now on peak_memory counts anew, from what is held now. Of a CPU on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system first
        Path("/proc/self/clear_refs").write_text("5")


def available_cores() -> int:
    """The cores that this process may use: a scheduler often grants fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_workers(workers: int | None):
    """UserError: more processes that read pictures than a network disk, which is waited for, can keep busy."""
    most = 8 * available_cores()
    if workers is not None and not 0 <= workers <= most:
        raise UserError(f"--workers {workers} must be at least 0 and at most {most}, eight times the "
                        f"{available_cores()} cores")


def default_workers() -> int:
    """Processes that read pictures for this one: the cores over the processes on this machine, at most 16."""
    return max(min(available_cores() // distributed.local_world(), 16), 1)
