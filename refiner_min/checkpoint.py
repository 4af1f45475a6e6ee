"""Weights on disk: saved so that a crash loses nothing, loaded so that a file can run no code, published ones included.

    save(state, path)                   written aside, then renamed; the file before it stays as its backup
    load(path) -> state                 the backup, with a word about it, where the file is damaged
    load_model(path) -> model, state    a model as training, or the published code, saved it
    load_pretrained("ti") -> model      the small weights that come with the package; a name goes for a path everywhere
    load_released(model, path)          published weights into a model of one's own

What a file of ours holds is FIELDS, and is checked once: check and config_of. It imports model and foreign.
"""

import argparse
import errno
import math
import os
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.nn.functional as F

from refiner_min import UserError, out_of_memory, replacing, some
from refiner_min.foreign import check_fields, read_torch
from refiner_min.model import RefinerConfig, RefinerViT

ASSETS = Path(__file__).parent / "assets"
PRETRAINED = ("ti", "plain-ti")  # trained on Imagenette, refined and plain: assets/NAME.pt, and a card beside it
FIELDS = {  # of a file of ours: engine.Run.origin, which best.pt holds beside its weights, and the rest of Run.state
    "subset": str, "data": str | None, "recipe_version": int, "recipe": dict[str, bool | int | float | str],
    "config": dict, "classes": list[str], "pictures": dict[str, int], "processes": int, "accumulate": int,
    "compiled": bool, "storage": str, "relabel": str | None, "annotator": str | None, "model": dict[str, torch.Tensor],
    "ema": dict[str, torch.Tensor] | None, "optimizer": dict, "scheduler": dict, "scaler": dict, "step": int,
    "history": list[dict[str, float]], "loss": torch.Tensor, "seconds": float,
}
PUBLISHED_NAMES = (  # published part of a parameter's name, ours
    *((f"patch_embed.conv{i + 1}.", f"stem.{i}.0.") for i in range(3)),
    *((f"patch_embed.bn{i + 1}.", f"stem.{i}.1.") for i in range(3)),
    ("patch_embed.proj.", "stem.3."),
    ("cls_token", "class_token"),
    ("pos_embed", "position"),
    ("aux_head.", "token_head."),
    (".mlp.scale_channel", ".mlp.scale"),
    (".attn.adapt_bn.", ".attention.refinement.norm."),
    (".attn.DLA.conv_exp.", ".attention.refinement.expand.0."),
    (".attn.DLA.bn1.", ".attention.refinement.expand.1."),
    (".attn.DLA.depth_sep_conv.", ".attention.refinement.convolve.0."),
    (".attn.DLA.bn2.", ".attention.refinement.convolve.1."),
    (".attn.DLA.conv_pro.", ".attention.refinement.reduce.0."),
    (".attn.DLA.bn3.", ".attention.refinement.reduce.1."),
    (".attn.", ".attention."),
)


def backup_of(path) -> Path:
    """Where save keeps the file that was at path before: last.pt -> last.backup.pt."""
    path = Path(path)
    return path.parent / f"{path.stem}.backup{path.suffix}"


def save(state: dict, path, backup: bool = False):
    """Write state to path, whole or not at all. backup: keep the file before it. UserError: full disk, no right."""
    with replacing(path) as file:
        torch.save(state, file)
        if backup and Path(path).exists():
            os.replace(path, backup_of(path))


class Damaged(UserError):
    """A file that could be read, and holds no whole checkpoint."""


def load(path, map_location="cpu", set_aside: bool = False) -> dict:
    """Read what save wrote, weights_only; one of PRETRAINED by its name, where no file is called so. Where it is
    damaged or missing, its backup, with a printed word about it; set_aside: a damaged one is moved out of the way, so
    that the next save does not make it the backup. UserError: neither can be read; or the disk or the memory does not
    let it be read now, which says nothing of the file."""
    path = Path(path)
    if str(path) in PRETRAINED and not path.exists():
        path = ASSETS / f"{path}.pt"
    backup = backup_of(path)
    try:
        return _read(path, map_location)
    except (Damaged, FileNotFoundError) as error:
        if not backup.exists():
            raise error if isinstance(error, UserError) else UserError(f"there is no checkpoint {path}") from None
        print(f"{path} is {'damaged' if path.exists() else 'missing'}: going on from the one before it, {backup.name}")
        if set_aside and path.exists():
            with suppress(OSError):
                os.replace(path, path.with_name(f"{path.stem}.damaged{path.suffix}"))
        return _read(backup, map_location)


def _read(path: Path, map_location="cpu") -> dict:
    """What the file holds: weights, and an argparse.Namespace, which the published files have beside them."""
    try:
        state = read_torch(path, map_location, allowed=[argparse.Namespace])
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        return state
    except FileNotFoundError:
        raise
    except Exception as error:  # damage shows in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if out_of_memory(error) or isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise UserError(f"{path} cannot be read ({reason})") from None
        raise Damaged(f"{path} is damaged or not a checkpoint ({reason})") from None


def check(state: dict, path, needed=()):
    """UserError: the state of a file of ours lacks one of the needed FIELDS, or has one of another kind."""
    try:
        check_fields(state, FIELDS, needed)
    except ValueError as error:
        raise UserError(f"{path} was not written by this version of refiner_min ({error})") from None


def weights_of(state: dict, wanted: str | None = None, path="the file") -> tuple[dict, str]:
    """The weights in a file's state, by our names, and which they are: "ema", their moving average, or "raw".

    wanted: one of the two, or None: of ours the average where there is one, of a published file the raw ones, as its
    code takes them. UserError: those that are wanted are not in the file.
    """
    ours = "config" in state
    keys = {"ema": "ema", "raw": "model"} if ours else {"raw": "state_dict", "ema": "state_dict_ema"}
    there = {which: state[key] for which, key in keys.items() if state.get(key) is not None}
    if not ours and not there:
        there = {"raw": state}
    which = wanted or next(iter(there), "raw")
    if which not in there:
        raise UserError(f"{path} holds no {which} weights, only {' and '.join(there) or 'what goes with them'}")
    try:
        check_fields(there, {which: dict[str, torch.Tensor]})
    except ValueError as error:
        raise UserError(f"{path} was not written by refiner_min.train, and is no published Refiner-ViT "
                        f"({error})") from None
    return there[which] if ours else {our_name(name): value for name, value in there[which].items()}, which


def load_pretrained(name: str) -> RefinerViT:
    """The model of one of PRETRAINED, in evaluation mode. UserError: no such name."""
    if name not in PRETRAINED:
        raise UserError(f"{name} is none of the weights that come with the package: {', '.join(PRETRAINED)}")
    return load_model(ASSETS / f"{name}.pt")[0]


def pack(source, path):
    """Write the weights that a run's file is evaluated with, and what they were made of; what has more than one
    dimension in bf16, since the rest, biases, scales and BatchNorm's statistics, is small. UserError: as load's and
    save's."""
    state = load(source)
    weights, which = weights_of(state, path=source)
    small = {name: value.bfloat16() if value.ndim > 1 else value for name, value in weights.items()}
    origin = ("subset", "data", "recipe_version", "recipe", "config", "classes", "pictures", "relabel", "annotator")
    save({name: state[name] for name in origin} | {"ema" if which == "ema" else "model": small}, path)


def load_model(path, map_location="cpu", wanted: str | None = None) -> tuple[RefinerViT, dict]:
    """The model that training or the published code saved at path, in evaluation mode, and all of the file. wanted: as
    weights_of's. UserError: no such file, damaged, or of no model that this version knows."""
    state = load(path, map_location)
    config = config_of(state, path, wanted)
    model = RefinerViT(config).to(map_location)
    load_weights(model, weights_of(state, wanted, path)[0])
    return model.eval(), state


def config_of(state: dict, path, wanted: str | None = None, needed=()) -> RefinerConfig:
    """The configuration of a file's model, which its weights fit: found out before memory is taken for it. What an
    older file of ours does not say of it is as it was then, and state says so from now on. needed: as check's, of a
    file of ours. UserError: they don't fit, or it is of no model that this version knows."""
    ours = "config" in state
    if ours:
        check(state, path, needed)
    weights, _ = weights_of(state, wanted, path)
    config = _saved_config(state, path) if ours else released_config(weights, path)
    try:
        if config.depth > len(weights):
            raise ValueError(f"it speaks of {config.depth} blocks, and holds {len(weights)} weights")
        with torch.device("meta"):  # which takes no memory
            faults = _misfits(RefinerViT(config).state_dict(), weights)
        if faults:
            raise ValueError(some(faults))
        if ours and len(state.get("classes", weights["head.bias"])) != config.num_classes:
            raise ValueError(f"it names {len(state['classes'])} classes, and its model has {config.num_classes}")
    except (ValueError, RuntimeError, OverflowError) as error:  # torch's, of sizes that cannot be
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} holds weights of another model than it says ({reason})") from None
    if ours:
        state["config"] = asdict(config)
    return config


def _saved_config(state: dict, path) -> RefinerConfig:
    try:
        check_fields(state["config"], {field.name: field.type for field in fields(RefinerConfig)})
        return RefinerConfig(**state["config"])
    except (TypeError, ValueError) as error:  # a field that this version does not know
        raise UserError(f"{path} was written by another version of refiner_min ({error})") from None


def released_config(weights: dict, path="the file") -> RefinerConfig:
    """The configuration of published weights, by our names, from their shapes. UserError: they are of another model."""
    try:
        return _released_config(weights)
    except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path} was not written by refiner_min.train, and is no published Refiner-ViT "
                        f"({error})") from None


def _released_config(weights: dict) -> RefinerConfig:
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    refined = min(name for name in weights if name.endswith("refinement.reduce.0.weight"))
    refinement = refined.removesuffix("reduce.0.weight")
    heads, expanded = weights[refined].shape[:2]
    dim, _, patch, _ = weights["stem.3.weight"].shape
    grid = round((weights["position"].shape[1] - 1) ** 0.5)
    kernel = weights.get(f"{refinement}convolve.0.weight")
    return RefinerConfig(
        img_size=grid * 2 * patch, patch_size=2 * patch, in_channels=weights["stem.0.0.weight"].shape[1],
        num_classes=len(weights["head.bias"]), dim=dim, depth=len(blocks), heads=heads,
        mlp_ratio=len(weights["blocks.0.mlp.fc1.bias"]) / dim, share=not refined.startswith("blocks.0."),
        expand=expanded // heads, kernel_size=1 if kernel is None else kernel.shape[2],
        dense="token_head.weight" in weights, stem=tuple(len(weights[f"stem.{index}.0.weight"]) for index in range(3)))


def load_weights(model: RefinerViT, weights: dict, classifier: bool = True):
    """Copy weights, by our names, into model. Positions of another grid are resized; classifier=False leaves the
    heads as they are. UserError: whatever does not fit, key by key, and then nothing is copied."""
    left_out = () if classifier else ("head.", "token_head.")
    weights, own = ({name: value for name, value in values.items() if not name.startswith(left_out)}
                    for values in (weights, model.state_dict()))
    position = weights.get("position")
    if position is not None and position.shape != own["position"].shape and _is_grid(position, model.config.dim):
        weights["position"] = _resize_position(position, model.config.grid)
    faults = _misfits(own, weights)
    if faults:
        raise UserError(f"the weights do not fit {model.config}: " + "; ".join(faults))
    unfit = [name for name, value in weights.items() if not value.isfinite().all()]
    if unfit:
        raise UserError(f"the weights are not finite: {some(unfit)}")
    model.load_state_dict(weights, strict=False)


def _misfits(own: dict, weights: dict) -> list[str]:
    """How weights differ from a model's own in names, shapes and kinds of number, one by one."""
    faults = [f"missing: {name}" for name in own if name not in weights]
    faults += [f"unknown: {name}" for name in weights if name not in own]
    both = [(name, weights[name], own[name]) for name in own if name in weights]
    faults += [f"{name}: {tuple(there.shape)} in the file, {tuple(here.shape)} in the model"
               for name, there, here in both if there.shape != here.shape]
    return faults + [f"{name}: {there.dtype} in the file, {here.dtype} in the model"
                     for name, there, here in both if there.is_floating_point() != here.is_floating_point()]


def _is_grid(position: torch.Tensor, dim: int) -> bool:
    """Whether these are positions (1, side * side + 1, dim)."""
    return position.ndim == 3 and len(position) == 1 and position.shape[2] == dim and (
        position.shape[1] > 1 and math.isqrt(position.shape[1] - 1) ** 2 == position.shape[1] - 1)


def _resize_position(position: torch.Tensor, grid: int) -> torch.Tensor:
    """Positions for another grid, bicubic; the class token's stays: (1, M, C) -> (1, grid * grid + 1, C).
    Enlarged as published, without antialiasing; made smaller, which the published code does not do, with it."""
    side = round((position.shape[1] - 1) ** 0.5)
    patches = position[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2).float()  # (1, C, side, side)
    patches = F.interpolate(patches, (grid, grid), mode="bicubic", antialias=grid < side)  # (1, C, grid, grid)
    return torch.cat([position[:, :1], patches.flatten(2).transpose(1, 2).to(position.dtype)], dim=1)


def load_released(model: RefinerViT, source, classifier: bool = True, wanted: str | None = None):
    """Copy published weights into model.

    source: a published .pth.tar file, or the state dict in it; plain, under "state_dict" or "state_dict_ema" (wanted:
    "raw" or "ema", raw if not said), with or without the prefix "module.". Positions of another grid are resized;
    classifier=False leaves both heads out, a model with dense=False the token head. UserError: what does not fit, key
    by key, or a file that is damaged or holds more than weights.
    Published: https://github.com/zhoudaquan/Refiner_ViT links L at 448 px only; its first version (2021-06) has no
    scale on the MLP's branch, so its weights do not fit.
    """
    if not isinstance(source, dict):
        if not Path(source).exists():
            raise UserError(f"there are no weights at {source}")
        source = _read(Path(source))
    weights, _ = weights_of(source, wanted)
    if not model.config.dense:
        weights = {name: value for name, value in weights.items() if not name.startswith("token_head.")}
    load_weights(model, weights, classifier)


def our_name(published: str) -> str:
    """Our name for a parameter that the published code calls published."""
    name = published.removeprefix("module.")
    for theirs, ours in PUBLISHED_NAMES:
        name = name.replace(theirs, ours)
    return name
