"""Trains a Refiner-ViT: python -m refiner_min.train --subset imagenette

The recipes stand first, then the pieces of training in the order in which a step uses them, then the command.
A run writes its folder: config.json, metrics.csv, curves.png, last.pt (to go on from) and best.pt (to use).

Several GPUs or machines: torchrun --nproc-per-node 8 -m refiner_min.train --subset imagenet --data DIR
Source of the steps: timm's training script as the published code runs it; the code is ours.
"""

import argparse
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.transforms import v2
from tqdm import tqdm

from refiner_min import UserError, __version__, checkpoint, data, model, plots, replacing, run_command

MODELS = {name: getattr(model, f"refiner_vit_{name}") for name in ("ti", "s", "m", "l")}
LOOK_EVERY = 20  # steps between two looks at the loss and, with several processes, at a request to stop


# ----------------------------------------------------------------------------------------------------------------------
# Recipes: all that decides a run's numbers, and what is chosen for each subset


def option(default, text: str, **argparse_options):
    return field(default=default, metadata={"help": text, **argparse_options})


@dataclass(frozen=True)
class Recipe:
    """What a run is made of. Every field is a flag of the command; the subclasses are the presets."""

    model: str = option("ti", "size of the model", choices=tuple(MODELS))
    img_size: int = option(64, "pixels a side")
    patch_size: int = option(8, "pixels a side of a patch")
    refine: bool = option(True, "refine the attention maps; --no-refine is a plain ViT of the same depth and width")
    share: bool = option(True, "blocks in pairs of own and shared map; --no-share refines every block's own")
    expand: int = option(3, "expanded maps a head; 1 for no expansion")
    kernel_size: int = option(3, "of the local convolution on the maps; 1 for none")
    linear: bool = option(False, "the paper's linear refinement, in every block (implies --no-share)")
    drop_path: float = option(0.0, "rate of stochastic depth at the last block")
    epochs: int = option(12, "passes over the training pictures")
    batch_size: int = option(64, "pictures a step, over all processes together")
    lr: float = option(1e-3, "peak learning rate; not given, the preset's is scaled with the batch size")
    min_lr: float = option(1e-5, "learning rate at the end of the cosine")
    warmup_epochs: float = option(1.0, "epochs of linear warm-up")
    cooldown_epochs: int = option(0, "epochs at min-lr at the end, counted in epochs")
    weight_decay: float = option(0.05, "AdamW's, on matrices and kernels only")
    ema: float = option(0.0, "decay of the weights' moving average, which is what is evaluated; 0 for none")
    smoothing: float = option(0.1, "label smoothing")
    mixup: float = option(0.0, "alpha of mixup; 0 for none. With cutmix too, each batch gets one of the two")
    cutmix: float = option(0.0, "alpha of cutmix; 0 for none")
    crop_min: float = option(0.35, "smallest area of a random crop, as a share of the picture's")
    crop_max: float = option(1.0, "largest; above 1 zooms out")
    flip: float = option(0.5, "probability of a mirrored picture")
    turn: float = option(0.0, "degrees to either side (decoded sets)")
    colour: float = option(0.0, "strength of brightness, contrast and saturation changes (decoded sets)")
    randaugment: int = option(0, "magnitude of RandAugment, 0 for none (streamed sets)")
    erasing: float = option(0.0, "probability of random erasing")
    eval_crop: float = option(1.0, "share of the shorter side that evaluation looks at")
    seed: int = option(0, "of the weights, the order and the augmentation")
    amp: str = option("auto", "number format of the matrix products; auto: bf16 where the hardware has it",
                      choices=("auto", "bf16", "fp16", "off"))


@dataclass(frozen=True)
class Digits(Recipe):
    """python -m refiner_min.train

    The 1,797 built-in digits, 1,442 to train on and 355 to validate, 32 px in 16 patches.
    """

    img_size: int = 32
    epochs: int = 24
    batch_size: int = 48
    lr: float = 2e-3
    warmup_epochs: float = 2.0
    ema: float = 0.98
    smoothing: float = 0.0
    crop_min: float = 0.7
    crop_max: float = 1.5
    flip: float = 0.0
    turn: float = 15.0


@dataclass(frozen=True)
class Photos(Recipe):
    """python -m refiner_min.train --subset imagenette

    Imagenette, Imagewoof or a folder of one's own on one recent GPU: 128 px in 256 patches. Meant for less than 10
    minutes on Imagenette; not measured yet, so no accuracy is given.
    """

    img_size: int = 128
    epochs: int = 100
    batch_size: int = 128
    warmup_epochs: float = 5.0
    drop_path: float = 0.1
    ema: float = 0.998
    mixup: float = 0.8
    cutmix: float = 1.0
    crop_min: float = 0.2
    colour: float = 0.4
    erasing: float = 0.25


@dataclass(frozen=True)
class PhotosOnCPU(Recipe):
    """python -m refiner_min.train --subset imagenette --device cpu

    The same sets without a GPU: 64 px in 64 patches, 12 epochs.
    """

    ema: float = 0.99
    colour: float = 0.3


@dataclass(frozen=True)
class ImageNet(Recipe):
    """torchrun --nproc-per-node 8 -m refiner_min.train --subset imagenet --data DIR

    The published recipe without token labels (scripts/refiner_s.yaml): S at 224 px, published accuracy 83.6 % with
    token labels, not run by us. The learning rate 5e-4 is taken for a batch of 256 (8 x 32): our reading, since the
    number of GPUs is not published, and it is scaled with the batch. M and L: --model m --drop-path 0.2.
    Different from the published code: the schedule moves every step instead of every epoch, RandAugment's magnitude
    does not vary, and the cosine regulariser, whose similarity runs over heads by mistake, is left out.
    On a CPU it is the same recipe: it would take months.
    """

    model: str = "s"
    img_size: int = 224
    patch_size: int = 16
    drop_path: float = 0.1
    epochs: int = 310
    cooldown_epochs: int = 10
    batch_size: int = 256
    lr: float = 5e-4
    warmup_epochs: float = 5.0
    ema: float = 0.99996
    mixup: float = 0.8
    cutmix: float = 1.0
    crop_min: float = 0.08
    randaugment: int = 9
    erasing: float = 0.25
    eval_crop: float = 0.9


PRESETS = {  # subset: preset on a GPU, preset on a CPU
    "digits": (Digits, Digits),
    "imagenette": (Photos, PhotosOnCPU),
    "imagewoof": (Photos, PhotosOnCPU),
    "folder": (Photos, PhotosOnCPU),
    "imagenet": (ImageNet, ImageNet),
}


def choose_recipe(subset: str, device: torch.device, given: dict) -> Recipe:
    """The subset's preset with the flags that were given."""
    preset = PRESETS[subset][device.type == "cpu"]()
    if given.get("linear"):
        given = {"share": False} | given
    recipe = replace(preset, **given)
    for name in ("epochs", "batch_size"):
        if getattr(recipe, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(recipe, name)} must be at least 1")
    if "lr" not in given:
        recipe = replace(recipe, lr=preset.lr * recipe.batch_size / preset.batch_size)
    if recipe.amp == "auto":
        recipe = replace(recipe, amp=hardware_amp(device))
    return recipe


def hardware_amp(device: torch.device) -> str:
    """bf16 where it is faster than float32, else fp16 on a GPU and off on a CPU."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "off"


def build_model(recipe: Recipe, subset: data.Subset, dense: bool = False) -> model.RefinerViT:
    """The model of the recipe, untrained. No token head by default: without token labels nothing would teach it."""
    names = ("img_size", "patch_size", "refine", "share", "expand", "kernel_size", "linear", "drop_path")
    torch.manual_seed(recipe.seed)
    try:
        return MODELS[recipe.model](num_classes=len(subset.classes), in_channels=subset.channels, dense=dense,
                                    **{name: getattr(recipe, name) for name in names})
    except ValueError as error:
        raise UserError(str(error)) from None


# ----------------------------------------------------------------------------------------------------------------------
# The pieces of a step


def parameter_groups(network, weight_decay: float) -> list[dict]:
    """Decay on matrices and kernels; none on biases, norms, scales, the class token and the positions (as timm's)."""
    decay, rest = [], []
    for name, parameter in network.named_parameters():
        keep = parameter.ndim <= 1 or name in ("class_token", "position")
        (rest if keep else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def schedule(recipe: Recipe, steps_per_epoch: int):
    """The learning rate as a share of the peak, by step: linear warm-up, cosine to min_lr, cool-down at it."""
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    end = (recipe.epochs - recipe.cooldown_epochs) * steps_per_epoch
    floor = min(recipe.min_lr / recipe.lr, 1)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min((step - warmup) / max(end - warmup, 1), 1)
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    return share


def make_mixing(recipe: Recipe, num_classes: int):
    """(images, labels) -> images and labels mixed within the batch by mixup or cutmix, one of the two at random."""
    mixes = [v2.MixUp(alpha=recipe.mixup, num_classes=num_classes)] if recipe.mixup else []
    mixes += [v2.CutMix(alpha=recipe.cutmix, num_classes=num_classes)] if recipe.cutmix else []
    return v2.RandomChoice(mixes) if mixes else lambda images, labels: (images, labels)


def make_augmentation(recipe: Recipe, split) -> data.Augmentation:
    streamed = isinstance(split, data.StreamSplit)
    area, colour = (None, 0.0) if streamed else ((recipe.crop_min, recipe.crop_max), recipe.colour)
    return data.Augmentation(recipe.img_size, area, flip=recipe.flip, turn=recipe.turn, colour=colour,
                             erasing=recipe.erasing)


def zeros(count: int, device: torch.device) -> torch.Tensor:
    """To sum up in; Apple's GPUs have no float64."""
    return torch.zeros(count, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


class LossWatch:
    """Sums the loss where it is computed. What it shows is a few steps old on a GPU, which is never waited for."""

    def __init__(self, device):
        self.device = device
        self.total = zeros(3, device)  # sum of losses, pictures, first bad step + 1
        self.shown, self.pending = math.nan, None

    def add(self, loss, count: int, step: int):
        loss = loss.detach()
        self.total[0] += loss * count
        self.total[1] += count
        self.total[2] += (step + 1) * ((self.total[2] == 0) & ~loss.isfinite())
        if self.pending is None and (step % LOOK_EVERY == 0 or self.device.type == "cpu"):
            values = torch.stack([loss.to(self.total), self.total[2]]).to("cpu", non_blocking=True)
            event = torch.cuda.Event() if self.device.type == "cuda" else None
            if event is not None:
                event.record()
            self.pending = values, event
        if self.pending is not None and (self.pending[1] is None or self.pending[1].query()):
            (self.shown, bad), self.pending = self.pending[0].tolist(), None
            self.check(bad)

    def mean(self) -> float:
        """The mean loss a picture since the start; waits for the device. UserError if it was ever not finite."""
        loss, count, bad = self.total.tolist()
        self.check(bad)
        return loss / count

    @staticmethod
    def check(bad: float):
        if bad:
            raise UserError(f"the loss was not finite at step {int(bad) - 1}; training stopped and the last good "
                            f"checkpoint was kept: a smaller --lr or a longer --warmup-epochs usually helps")


class StopRequest:
    """Ctrl-C and SIGTERM end training after the step; the second one ends it at once."""

    def __enter__(self):
        self.signal = None
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.signal = number
        self.__exit__()

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, step: int, device) -> bool:
        """Whether to stop after this step; several processes ask each other now and then, and stop together."""
        if not dist.is_initialized():
            return self.signal is not None
        if step % LOOK_EVERY:
            return False
        number = torch.tensor(self.signal or 0, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        self.signal = int(number) or None
        return self.signal is not None


# ----------------------------------------------------------------------------------------------------------------------
# A run


class Run:
    """A training run: the model, its average, the optimizer and how far they are. Everything that is random in a step
    is drawn from a seed made of the run's seed and the step, so no state of a generator needs to be kept."""

    def __init__(self, recipe: Recipe, subset: data.Subset, network: model.RefinerViT, device: torch.device,
                 compiled: bool = False):
        self.recipe, self.subset, self.device = recipe, subset, device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.train_split, self.val_split = subset.train.to(device), subset.val.to(device)
        self.steps_per_epoch = len(subset.train) // recipe.batch_size
        self.model = network.to(device)
        self.ema = deepcopy(self.model) if recipe.ema else None
        groups = parameter_groups(self.model, recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=device.type in ("cpu", "cuda"))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule(recipe, self.steps_per_epoch))
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        self.mix = make_mixing(recipe, len(subset.classes))
        self.augment = make_augmentation(recipe, subset.train)
        self.network = DistributedDataParallel(self.model) if self.world > 1 else self.model
        self.network = torch.compile(self.network) if compiled else self.network
        self.step, self.history, self.loss = 0, [], LossWatch(device)
        self.seconds = 0.0  # of the epoch under way, spent before an interruption

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    def evaluated(self):
        """The weights that are evaluated and kept as the best: the average, if there is one."""
        return self.ema if self.ema is not None else self.model

    def update_average(self):
        """Move the average towards the weights and BatchNorm's statistics; young, it follows them closely. torch's
        AveragedModel waits for the GPU every step, to move its counter there; so only its function is used."""
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        average, current = ([value for value in module.state_dict().values() if value.is_floating_point()]
                            for module in (self.ema, self.model))
        get_ema_multi_avg_fn(decay)(average, current, None)

    def autocast(self):
        dtype = torch.float16 if self.recipe.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.recipe.amp != "off")

    def origin(self) -> dict:
        """What was trained on what."""
        return {"config": asdict(self.model.config), "recipe": asdict(self.recipe), "subset": self.subset.name,
                "data": self.subset.root, "classes": self.subset.class_names}

    def state(self) -> dict:
        """All of the run, to go on from."""
        return {
            **self.origin(), "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(), "step": self.step, "history": self.history,
            "loss": self.loss.total, "seconds": self.seconds,
        }

    def best_state(self) -> dict:
        """What using the model needs."""
        return {**self.origin(), "model": self.evaluated().state_dict(), "row": self.history[-1]}

    def restore(self, state: dict):
        """Go on from a state."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history, self.seconds = state["step"], state["history"], state["seconds"]
        self.loss.total.copy_(state["loss"])

    def order(self, epoch: int) -> torch.Tensor:
        """This process's share of the epoch's pictures, batch by batch; the incomplete last batch is left out."""
        generator = torch.Generator().manual_seed(hash((self.recipe.seed, epoch)))
        order = torch.randperm(len(self.train_split), generator=generator)
        return order[: self.steps_per_epoch * self.recipe.batch_size].view(-1, self.world)[:, self.rank]

    def train_epoch(self, stop: StopRequest, bar: tqdm):
        """Train to the end of the epoch, or to the end of the step in which stopping is asked for."""
        self.network.train()
        share = self.recipe.batch_size // self.world  # pictures a step in this process
        epoch, start = divmod(self.step, self.steps_per_epoch)
        for pictures, aspects, labels in self.train_split.epoch(self.order(epoch)[start * share:], share, epoch):
            torch.manual_seed(hash((self.recipe.seed, self.step, self.rank)))
            images, labels = self.mix(self.augment(pictures, aspects), labels)
            self.train_step(images, labels)
            bar.update(self.recipe.batch_size)
            bar.set_postfix(loss=f"{self.loss.shown:.3f}", refresh=False)
            if stop.agreed(self.step, self.device):
                return

    def train_step(self, images, labels):
        """One step on images (B, channels, S, S) and labels (B,), or (B, K) when they are mixed."""
        with self.autocast():
            logits = self.network(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.smoothing)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.ema is not None:
            self.update_average()
        self.loss.add(loss, len(images), self.step)
        self.step += 1

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy over the validation pictures, in float32: so that no machine and no batch size
        changes them."""
        network = self.evaluated().eval()
        totals = zeros(3, self.device)  # sum of losses, right answers, pictures
        indices = torch.arange(self.rank, len(self.val_split), self.world)
        for pictures, aspects, labels in self.val_split.epoch(indices, self.recipe.batch_size):
            if isinstance(self.val_split, data.StreamSplit):
                images = pictures.float() / 127.5 - 1
            else:
                images = data.center_crop(pictures, aspects, self.recipe.img_size, self.recipe.eval_crop)
            logits = network(images)
            totals[0] += F.cross_entropy(logits, labels, reduction="sum")
            totals[1] += (logits.argmax(dim=1) == labels).sum()
            totals[2] += len(labels)
        if self.world > 1:
            dist.all_reduce(totals)
        loss, right, count = totals.tolist()
        return loss / count, right / count


# ----------------------------------------------------------------------------------------------------------------------
# The run's folder


def facts(run: Run) -> dict:
    """What config.json says: enough to run it again and to compare it."""
    return {
        "command": " ".join(["python -m refiner_min.train", *sys.argv[1:]]),
        "subset": run.subset.name,
        "data": run.subset.root,
        "recipe": asdict(run.recipe),
        "config": asdict(run.model.config),
        "classes": run.subset.class_names,
        "pictures": {"train": len(run.train_split), "val": len(run.val_split)},
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "hardware": describe(run.device),
        "processes": run.world,
        "versions": {"refiner_min": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__,
                     "python": platform.python_version()},
        "commit": package_commit(),
    }


def package_commit() -> str | None:
    """The last commit that changed the package; None where there is no git or no repository of it."""
    try:
        git = subprocess.run(["git", "log", "-1", "--format=%H", "--", "."], cwd=Path(__file__).parent,
                             capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() or None


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name") or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else f"{device.type}, {name}"


def write_json(path: Path, record: dict):
    with replacing(path) as file:
        file.write(f"{json.dumps(record, indent=1)}\n".encode())


def write_history(out: Path, history: list[dict], title: str):
    """metrics.csv and curves.png, anew from the history, so that they never disagree with the checkpoint."""
    lines = [",".join(history[0]), *(",".join(map(str, row.values())) for row in history)]
    with replacing(out / "metrics.csv") as file:
        file.write("\n".join([*lines, ""]).encode())
    plots.save_figure(plots.training_curves(history, title), out / "curves.png")


def row_of(run: Run, loss: float, val_loss: float, accuracy: float, seconds: float) -> dict:
    images = run.steps_per_epoch * run.recipe.batch_size
    return {"epoch": run.epoch, "step": run.step, "lr": run.scheduler.get_last_lr()[0], "train_loss": loss,
            "val_loss": val_loss, "val_accuracy": accuracy, "seconds": round(seconds, 1),
            "images_per_second": round(images / seconds, 1)}


HEADER = "epoch     step    next lr train loss  val loss accuracy seconds    img/s"
TABLE = ("{epoch:>5} {step:>8} {lr:>10.3g} {train_loss:>10.4f} {val_loss:>9.4f} {val_accuracy:>8.2%} {seconds:>7.0f} "
         "{images_per_second:>8.0f}")


def fit(run: Run, out: Path, title: str) -> int:
    """Train to the end, saving after every epoch. Returns the exit status: 0, or 128 + the signal that ended it."""
    total = run.recipe.epochs * run.steps_per_epoch
    main = run.rank == 0
    batch = run.recipe.batch_size
    bar = tqdm(total=total * batch, initial=run.step * batch, unit="img", unit_scale=True, dynamic_ncols=True,
               disable=None if main else True)  # None: no bar where there is no terminal
    if main:
        if run.step == 0:  # a run that is killed in its first epoch can be resumed too
            checkpoint.save(run.state(), out / "last.pt")
        tqdm.write(HEADER)
        for row in run.history:
            tqdm.write(TABLE.format(**row))
    with StopRequest() as stop, bar:
        while run.step < total:
            started = time.perf_counter()
            epoch = run.epoch
            run.train_epoch(stop, bar)
            loss = run.loss.mean()  # waits for the device, so that the time is right
            run.seconds += time.perf_counter() - started
            if run.epoch == epoch:  # stopped on the way
                return stopped(run, out, stop)
            val_loss, accuracy = run.evaluate()
            run.history.append(row_of(run, loss, val_loss, accuracy, run.seconds))
            run.loss, run.seconds = LossWatch(run.device), 0.0
            if main:
                tqdm.write(TABLE.format(**run.history[-1]))
                if accuracy >= max(row["val_accuracy"] for row in run.history):
                    checkpoint.save(run.best_state(), out / "best.pt")
                checkpoint.save(run.state(), out / "last.pt", backup=True)
                write_history(out, run.history, title)
            if run.step < total and stop.agreed(0, run.device):
                return stopped(run, out, stop)
    return 0


def stopped(run: Run, out: Path, stop: StopRequest) -> int:
    """Save, say how to go on, and give the exit status of the signal."""
    if run.rank == 0:
        checkpoint.save(run.state(), out / "last.pt", backup=True)
        print(f"stopped after step {run.step}; to go on: python -m refiner_min.train --resume {out}")
    return 128 + stop.signal


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse(arguments=None) -> tuple[argparse.Namespace, dict]:
    """The command's own flags, and those of the recipe that were given."""
    parser = argparse.ArgumentParser(prog="python -m refiner_min.train", description="Train or evaluate a Refiner-ViT. "
                                     "What is not given comes from the subset's preset, and is printed first.")
    parser.add_argument("--subset", choices=data.SUBSETS, help="the data (default: digits, which is built in)")
    parser.add_argument("--data", metavar="DIR", help="folder with train/ and val/ (default: below data/, downloaded)")
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/SUBSET)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one; mps is untested)")
    parser.add_argument("--workers", type=int, help="processes that read a streamed set (default: the cores)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model: slow to start, then faster")
    parser.add_argument("--skip-bad", action="store_true", help="leave out pictures that cannot be read")
    parser.add_argument("--resume", metavar="PATH", nargs="?", const="",
                        help="go on with the run in this folder (default: that of --out)")
    parser.add_argument("--weights", metavar="PATH", help="start from these weights, ours or published")
    parser.add_argument("--eval", action="store_true", help="evaluate --weights (default: best.pt of --out) and stop")
    recipe = parser.add_argument_group("recipe", "(each subset has its own preset, on a GPU and on a CPU)")
    for item in fields(Recipe):
        how = {"action": argparse.BooleanOptionalAction} if item.type is bool else {"type": item.type}
        recipe.add_argument(f"--{item.name.replace('_', '-')}", default=argparse.SUPPRESS, **how, **item.metadata)
    known = vars(parser.parse_args(arguments))
    given = {item.name: known.pop(item.name) for item in fields(Recipe) if item.name in known}
    return argparse.Namespace(**known), given


def choose_device(name: str | None) -> torch.device:
    if name is None:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0]})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where a product is not in the recipe's format anyway
    return device


def check_saved(saved: dict, asked: dict, path):
    """UserError naming the fields in which what was asked for differs from what the file at path was made with."""
    differing = [f"{name} ({saved.get(name)} there, {value} here)" for name, value in asked.items()
                 if saved.get(name) != value]
    if differing:
        raise UserError(f"{path} was made with another configuration: {', '.join(differing)}")


def load_start(network: model.RefinerViT, state: dict, path: str, class_names: list[str]):
    """Put the weights of state, ours or published, into network; its heads stay new where the classes are others."""
    if "config" not in state:
        return checkpoint.load_released(network, state, classifier=network.config.num_classes == 1000)
    free = ("img_size", "num_classes", "drop_path", "dense")
    asked = {name: value for name, value in asdict(network.config).items() if name not in free}
    check_saved(state["config"], asked, path)
    same = state["classes"] == class_names
    return checkpoint.load_weights(network, state.get("ema") or state["model"], classifier=same)


def open_run(args: argparse.Namespace, given: dict, device: torch.device) -> tuple[Run, Path]:
    """The run that the flags ask for, new or resumed, and its folder. UserError before anything is written."""
    state, path = None, None
    out = Path(args.out or f"runs/{args.subset or 'digits'}")
    if args.resume is not None:
        path = Path(args.resume or out)
        path = path / "last.pt" if path.is_dir() or not path.suffix else path
        state, out = checkpoint.load(path), path.parent
    elif args.weights or args.eval:
        path = Path(args.weights or out / "best.pt")
        state = checkpoint.load(path)
    ours = state is not None and "recipe" in state
    if args.resume is not None and (not ours or "optimizer" not in state):
        raise UserError(f"{path} is no checkpoint to go on from: --resume takes the folder of a run or its last.pt")
    args.subset = args.subset or (state["subset"] if ours else "digits")
    args.data = args.data or (state["data"] if ours and args.subset == state["subset"] else None)
    if args.resume is not None:
        check_saved({"subset": state["subset"], **state["recipe"]}, {"subset": args.subset, **given}, path)
        recipe = Recipe(**state["recipe"])
    elif ours and args.eval:
        recipe = replace(Recipe(**state["recipe"]), **given)
    else:
        recipe = choose_recipe(args.subset, device, given)
    subset = open_subset(args, recipe)
    network = build_model(recipe, subset, dense=args.eval and not ours)  # the published models evaluate with both heads
    if state is not None and args.resume is None:
        load_start(network, state, path, subset.class_names)
        if args.eval and ours and state["classes"] != subset.class_names:
            raise UserError(f"{path} knows {', '.join(state['classes'][:3])}, ..., not the classes of {args.subset}")
    run = Run(recipe, subset, network, device, args.compile)
    if args.resume is not None:
        run.restore(state)
    return run, out


def open_subset(args: argparse.Namespace, recipe: Recipe) -> data.Subset:
    workers = args.workers if args.workers is not None else min(os.cpu_count(), 16)
    area = (recipe.crop_min, recipe.crop_max)
    transform = data.stream_transform(recipe.img_size, area, recipe.flip, recipe.randaugment)
    subset = data.load_subset(args.subset, args.data, recipe.img_size, crop=recipe.eval_crop, seed=recipe.seed,
                              workers=workers, skip_bad=args.skip_bad, transform=transform)
    if not args.eval and recipe.batch_size > len(subset.train):
        raise UserError(f"--batch-size {recipe.batch_size} is larger than the {len(subset.train)} training pictures")
    return subset


def announce(run: Run):
    """Say what was chosen, before anything happens."""
    config, recipe = run.model.config, run.recipe
    kind = "linear refinement" if config.linear else "refined" if config.refine else "plain ViT"
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    print(f"{run.subset.name}: {len(run.train_split):,} pictures to train on, {len(run.val_split):,} to validate, "
          f"{len(run.subset.classes)} classes")
    print(f"model {recipe.model}: {kind}, {parameters:,} parameters, {config.img_size} px in {config.grid**2} patches")
    print(f"on {describe(run.device)}{f' x {run.world}' if run.world > 1 else ''}")
    print("recipe: " + ", ".join(f"{name} {value}" for name, value in asdict(recipe).items()), flush=True)


def prepare_folder(run: Run, out: Path):
    """Make the run's folder with its config.json. UserError: it holds a run, or cannot be written."""
    held = [name for name in ("config.json", "metrics.csv", "last.pt", "best.pt") if (out / name).exists()]
    if held:
        raise UserError(f"{out} holds a run already ({held[0]}): --resume {out} goes on with it, --out DIR keeps both")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error})") from None
    write_json(out / "config.json", facts(run))


def finish(run: Run, out: Path, title: str):
    """Complete the run's folder and say where the results are."""
    write_history(out, run.history, title)
    best = max(run.history, key=lambda row: (row["val_accuracy"], row["epoch"]))
    result = {"minutes": round(sum(row["seconds"] for row in run.history) / 60, 2),
              "images_per_second": statistics.median(row["images_per_second"] for row in run.history),
              "accuracy": run.history[-1]["val_accuracy"], "best_accuracy": best["val_accuracy"],
              "best_epoch": best["epoch"], "weights": "EMA" if run.ema is not None else "last"}
    path = out / "config.json"
    record = json.loads(path.read_text()) if path.exists() else facts(run)
    write_json(path, record | {"result": result})
    weights = "the weights' moving average" if run.ema is not None else "the weights"
    print(f"accuracy {result['accuracy']:.2%} with {weights} (best {result['best_accuracy']:.2%} after epoch "
          f"{best['epoch']}), {result['minutes']:.1f} minutes of training; {out}/best.pt, {out}/curves.png")


def main(arguments=None) -> int:
    args, given = parse(arguments)
    device = choose_device(args.device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    run, out = open_run(args, given, device)
    if run.rank == 0:
        announce(run)
    if args.eval:
        loss, accuracy = run.evaluate()
        if run.rank == 0:
            right = round(accuracy * len(run.val_split))
            print(f"accuracy {accuracy:.4%} ({right} of {len(run.val_split)}), loss {loss:.4f}")
        return 0
    if run.recipe.batch_size % run.world:
        raise UserError(f"--batch-size {run.recipe.batch_size} must be a multiple of the {run.world} processes")
    if run.rank == 0 and args.resume is None:
        prepare_folder(run, out)
    title = f"{run.subset.name}, model {run.recipe.model}{'' if run.recipe.refine else ', plain ViT'}"
    try:
        status = fit(run, out, title)
    except torch.OutOfMemoryError:
        raise UserError(f"--batch-size {run.recipe.batch_size} needs more memory than the GPU has") from None
    if status == 0 and run.rank == 0:
        finish(run, out, title)
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    run_command(main)
