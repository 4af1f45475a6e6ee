"""How fast the model is here, beside what the hardware allows: python -m refiner_min.bench

One run, variant beside variant, interleaved round by round, medians: evaluation (--mode eval) or the forward and
backward pass of training (--mode train), in float32 and bf16.
    reference     float32, the published code's order of operations, eager: what the golden numbers hold; on a CPU in a
                  process of its own, whose memory is torch's default (hardware.keep_freed_memory)
    eager         as the commands run it
    compiled      by torch.compile
    folded        evaluation: without BatchNorm (fold.py), eager or compiled, whichever was faster here
    checkpointed  training: maps are computed again instead of being kept (memory.py)
    timm          a ViT-S/16 of timm, where that is installed: the yardstick of a plain ViT
The floor is the time that the hardware needs at the least (floor.py). It imports model, fold, floor, memory, stopwatch
and hardware.
"""

import argparse
import itertools
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from refiner_min import UserError, hardware, model, out_of_memory, run_command, write_json
from refiner_min.floor import count, least_seconds, probes, step
from refiner_min.fold import fold
from refiner_min.memory import kept_bytes, recompute_maps, refinement_bytes
from refiner_min.stopwatch import Elsewhere, measured, medians, peak

MODELS = {name: getattr(model, f"refiner_vit_{name}") for name in ("ti", "s", "m", "l")}
FORMATS = {"float32": "off", "bfloat16": "bf16"}  # torch's name, and what autocast is called by
YARDSTICK = "timm ViT-S/16"


class Variant(NamedTuple):
    """name: as above; compiled: by torch.compile; call() is what is measured."""

    name: str
    dtype: str
    compiled: bool
    call: Callable | Elsewhere


def reference(build: Callable, images, training: bool) -> Callable:
    """What is measured of it, ready to be called; in another process, on a CPU."""
    torch.manual_seed(0)
    return partial(in_format, "float32", build().to(images.device).train(training), training, images)


def variants(build: Callable, images, training: bool) -> list[Variant]:
    """Of the model, but for the reference, in the order of the table."""
    torch.manual_seed(0)
    used, device = build().to(images.device).train(training), images.device
    hardware.set_up_training(used, device, "bf16")
    found = [("eager", used, False), ("compiled", used, True)]
    if training:
        again = deepcopy(used)
        recompute_maps(again)
        found.append(("checkpointed", again, False))
    else:
        found += [("folded", fold(used), compiled) for compiled in (False, True)]
    if (yardstick := plain_vit(used.config.img_size)) is not None:
        found += [(YARDSTICK, yardstick.to(device).train(training), compiled) for compiled in (False, True)]
    return [Variant(name, dtype, compiled,
                    partial(in_format, dtype, torch.compile(network) if compiled else network, training, images))
            for name, network, compiled in found for dtype in FORMATS]


def plain_vit(img_size: int) -> nn.Module | None:
    """timm's ViT-S/16, if timm is there."""
    try:
        import timm
    except ImportError:
        return None
    return timm.create_model("vit_small_patch16_224", img_size=img_size)


def in_format(dtype: str, network: nn.Module, training: bool, images):
    """A step with the matrix products in that format."""
    with hardware.exact_float32(), hardware.autocast(images.device, FORMATS[dtype]):
        step(network, training, images)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(build: Callable, batch_size: int, training: bool, device: torch.device, rounds: int) -> list[dict]:
    """A row a variant, with the rates of a matrix product in its format and of a copy."""
    shape = (batch_size, 3, build().config.img_size, build().config.img_size)
    images, hard = torch.randn(shape, device=device), probes(device)
    words = reference, build, images, training
    first = Elsewhere(*words) if device.type == "cpu" else reference(*words[1:])
    compared = [Variant("reference", "float32", False, first), *filter(can_be_run, variants(build, images, training))]
    calls = [variant.call for variant in compared]
    times = medians([*calls, *(call for call, _ in hard.values())], rounds, device)
    rates = {name: amount / taken for (name, (_, amount)), taken in zip(hard.items(), times[len(calls):])}
    counted = {name: count(partial(plain_vit, shape[2]) if name == YARDSTICK else build, shape, training)
               for name in {variant.name for variant in compared}}
    rows = {}
    for variant, call, taken in zip(compared, calls, times):
        dtype = getattr(torch, variant.dtype)
        row = {"variant": variant.name, "dtype": variant.dtype, "mode": "train" if training else "eval",
               "compiled": variant.compiled, "ms": 1000 * taken, "images_per_second": batch_size / taken,
               "peak_bytes": measured(peak, call, device), "gflops": counted[variant.name][0] / taken / 1e9,
               "floor_share": least_seconds(counted[variant.name], dtype, rates) / taken,
               "matrix_gflops": rates[str(dtype)] / 1e9, "copy_gigabytes": rates["copy"] / 1e9}
        key = variant.name, variant.dtype
        rows[key] = min(rows.get(key, row), row, key=lambda row: row["ms"])  # of folded and timm the faster one
    if isinstance(first, Elsewhere):
        first.close()
    return list(rows.values())


def can_be_run(variant: Variant) -> bool:
    """Whether this machine can compile it, if that is wanted; says so if not."""
    try:
        if variant.compiled:
            variant.call()
    except RuntimeError as error:  # all that torch.compile fails with, be it for want of a compiler
        if out_of_memory(error):
            raise
        print(f"{variant.name} in {variant.dtype}, compiled: left out, torch.compile fails here "
              f"({str(error).strip().splitlines()[0]})")
        return False
    return True


def map_memory(device: torch.device) -> str:
    """What the refinements keep for the backward pass in bf16, a picture: by the formula, and measured."""
    lines = ["kept by the refinements in training, bf16, MB a picture: by the formula, measured"]
    for name, size in itertools.product("sml", (224, 384, 448)):
        with torch.device("meta"):
            config = MODELS[name](img_size=size).config
        maps = torch.rand(1, config.heads, *2 * [config.grid**2 + 1], device=device).bfloat16()
        with hardware.autocast(device, "bf16"):
            kept = kept_bytes(partial(model.Refinement(config).to(device), maps)) - maps.nbytes  # attention's, too
        lines.append(f"{name} {size}{refinement_bytes(config) / 1e6:10.0f}{config.depth // 2 * kept / 1e6:10.0f}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def table(rows: list[dict]) -> str:
    """For people."""
    lines = [f"{'variant':16}{'format':10}{'ms':>9}{'img/s':>9}{'peak MB':>9}{'GFLOP/s':>9}{'of the floor':>14}"]
    for row in rows:
        lines.append(f"{row['variant']:16}{row['dtype']:10}{row['ms']:9.1f}{row['images_per_second']:9.1f}"
                     f"{row['peak_bytes'] / 1e6:9.0f}{row['gflops']:9.0f}{row['floor_share']:13.0%}"
                     f"{'  compiled' if row['compiled'] else ''}")
    rates = {f"matrix product in {row['dtype']}: {row['matrix_gflops']:,.0f} GFLOP/s" for row in rows}
    return "\n".join([*lines, *sorted(rates), f"copy: {rows[0]['copy_gigabytes']:.0f} GB/s"])


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m refiner_min.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="s", help="default: s")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", default=224, help="default: 224")
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: 128 on a GPU, else 8")
    parser.add_argument("--mode", choices=["eval", "train"], default="eval", help="default: eval")
    parser.add_argument("--rounds", type=int, metavar="N", default=7, help="medians are over so many (default: 7)")
    parser.add_argument("--device", metavar="NAME", help="default: a GPU if there is one")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    parser.add_argument("--maps", action="store_true", help="say what the maps of S, M and L keep, and stop")
    args = parser.parse_args(arguments)
    for name in ("batch_size", "rounds", "img_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    return args


def main(arguments=None) -> int:
    args = parse(arguments)
    device = hardware.choose_device(args.device)
    if args.maps:
        print(map_memory(device))
        return 0
    build = partial(MODELS[args.model], img_size=args.img_size)
    try:
        with torch.device("meta"):
            build()
    except ValueError as error:
        raise UserError(f"--img-size {args.img_size}: {error}") from None
    batch_size = args.batch_size or (128 if device.type == "cuda" else 8)
    origin = {"model": args.model, "img_size": args.img_size, "batch_size": batch_size, "rounds": args.rounds,
              "hardware": hardware.describe(device), "torch": torch.__version__}
    print(", ".join(f"{name} {value}" for name, value in origin.items()), flush=True)
    rows = measure(build, batch_size, args.mode == "train", device, args.rounds)
    print(table(rows))
    if args.json:
        write_json(Path(args.json), [row | origin for row in rows])
    return 0


if __name__ == "__main__":
    run_command(main)
