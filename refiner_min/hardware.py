"""What the machine offers: the device to compute on, its number format, its name, its cores. Commands ask here."""

import os
import platform

import torch

from refiner_min import UserError, distributed


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None: a GPU if there is one. UserError: it cannot be used here."""
    if name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name or "cpu")
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0]})") from None
    return device


def hardware_amp(device: torch.device) -> str:
    """bf16 where it is faster than float32, else fp16 on a GPU and off on a CPU."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "off"


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Matrix products in that format: "bf16", "fp16" or "off"."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "off")


def describe(device: torch.device) -> str:
    """The hardware, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name") or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else f"{device.type}, {name}"


def available_cores() -> int:
    """The cores that this process may use: a scheduler often grants fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers() -> int:
    """Processes that read pictures for this one: the cores over the processes on this machine, at most 16."""
    return max(min(available_cores() // distributed.local_world(), 16), 1)
