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
import shlex
import signal
import statistics
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from refiner_min import UserError, __version__, checkpoint, data, hardware, model, plots, replacing, run_command
from refiner_min.relabel import Labels, TokenLabelLoss, box_share, cutmix, mix_token_box, mixup, pool_label_map

MODELS = {name: getattr(model, f"refiner_vit_{name}") for name in ("ti", "s", "m", "l")}
LOOK_EVERY = 20  # steps between two looks at the loss and, with several processes, at a request to stop


# ----------------------------------------------------------------------------------------------------------------------
# Recipes: all that decides a run's numbers, and what is chosen for each subset


def option(default, text: str, low=-math.inf, high=math.inf, choices=None):
    """A field of a recipe: its default, what it is, and the range that it must lie in."""
    return field(default=default, metadata={"help": text, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Recipe:
    """What a run is made of. Every field is a flag of the command; the subclasses are the presets."""

    model: str = option("ti", "size of the model", choices=tuple(MODELS))
    img_size: int = option(64, "pixels a side", 2)
    patch_size: int = option(8, "pixels a side of a patch", 2)
    refine: bool = option(True, "refine the attention maps; --no-refine is a plain ViT of the same depth and width")
    share: bool = option(True, "blocks in pairs of own and shared map; --no-share refines every block's own")
    expand: int = option(3, "expanded maps a head; 1 for no expansion", 1)
    kernel_size: int = option(3, "of the local convolution on the maps; 1 for none", 1)
    linear: bool = option(False, "the paper's linear refinement, in every block (implies --no-share)")
    drop_path: float = option(0.0, "rate of stochastic depth at the last block", 0, 0.99)
    epochs: int = option(12, "passes over the training pictures", 1)
    batch_size: int = option(64, "pictures a step, over all processes together", 1)
    lr: float = option(1e-3, "peak learning rate; not given, the preset's is scaled with the batch size", 1e-12)
    min_lr: float = option(1e-5, "learning rate at the end of the cosine", 0)
    warmup_epochs: float = option(1.0, "epochs of linear warm-up; not given, fewer in a shorter run", 0)
    cooldown_epochs: int = option(0, "last epochs, at min-lr; not given, fewer in a shorter run", 0)
    weight_decay: float = option(0.05, "AdamW's, on matrices and kernels only", 0)
    ema: float = option(0.0, "decay of the weights' moving average, which is what is evaluated; 0 for none", 0, 1)
    smoothing: float = option(0.1, "label smoothing", 0, 1)
    dense_weight: float = option(0.0, "weight of the patch tokens' loss, 0.5 with --relabel; 0: no token head", 0)
    token_labels: bool = option(True, "the patch tokens learn from token labels where there are any; with "
                                "--no-token-labels, and where there are none, each from its picture's label")
    mix_token: bool = option(False, "MixToken: swap a box of tokens with another picture's")
    mixup: float = option(0.0, "alpha of mixup; 0 for none. With cutmix too, each batch gets one of the two", 0)
    cutmix: float = option(0.0, "alpha of cutmix; 0 for none", 0)
    crop_min: float = option(0.35, "smallest area of a random crop, as a share of the picture's", 0.001, 1)
    crop_max: float = option(1.0, "largest; above 1 zooms out (decoded sets)", 0.001)
    flip: float = option(0.5, "probability of a mirrored picture", 0, 1)
    turn: float = option(0.0, "degrees to either side (decoded sets)", 0, 180)
    colour: float = option(0.0, "strength of brightness, contrast and saturation changes (decoded sets)", 0, 1)
    randaugment: int = option(0, "magnitude of RandAugment, 0 for none (streamed sets)", 0, 30)
    erasing: float = option(0.0, "probability of random erasing", 0, 1)
    eval_crop: float = option(1.0, "share of the shorter side that evaluation looks at", 0.01, 1)
    seed: int = option(0, "of the weights, the order and the augmentation", 0)
    amp: str = option("auto", "number format of the matrix products; auto: bf16 where the hardware has it",
                      choices=("auto", "bf16", "fp16", "off"))

    def check(self):
        """UserError naming the first field that is out of its range."""
        for item in fields(Recipe):
            value, low, high = getattr(self, item.name), item.metadata["low"], item.metadata["high"]
            flag = f"--{item.name.replace('_', '-')} {value}"
            if item.type in (int, float) and not low <= value <= high:
                top = f" and at most {high:g}" if high < math.inf else ""
                raise UserError(f"{flag} must be at least {low:g}{top}")
        if self.crop_min > self.crop_max:
            raise UserError(f"--crop-min {self.crop_min} must not be above --crop-max {self.crop_max}")
        if self.warmup_epochs + self.cooldown_epochs > self.epochs:
            raise UserError(f"--warmup-epochs {self.warmup_epochs:g} and --cooldown-epochs {self.cooldown_epochs} must "
                            f"fit into --epochs {self.epochs}")


@dataclass(frozen=True)
class Digits(Recipe):
    """python -m refiner_min.train

    The 1,797 built-in digits, 1,442 to train on and 355 to validate, 32 px in 16 patches. On two cores of an AMD EPYC
    with bf16: 1.5 minutes, 99.3 % (mean of three seeds; notebooks/results/digits-cpu-seed*.json).
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
class DigitScenes(Recipe):
    """python -m refiner_min.train --subset digit-scenes

    Scenes of up to four of the digits, 32 px in 64 patches whose labels are known; 10,000 new ones an epoch, 1,000 to
    validate. On two cores of an AMD EPYC with bf16: about 2 minutes, 95.6 % of the pictures, 84.7 % of the tokens (mean
    of three seeds; notebooks/results/digit-scenes-cpu-tokens-seed*.json). The patch tokens' loss weighs eight times
    what is published: with 0.5, tokens had by then hardly begun to name their own digit.
    """

    img_size: int = 32
    patch_size: int = 4
    epochs: int = 2
    lr: float = 2e-3
    warmup_epochs: float = 0.5
    ema: float = 0.99
    smoothing: float = 0.0
    dense_weight: float = 4.0


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

    The same sets without a GPU: 64 px in 64 patches, 12 epochs. Imagenette on two cores of an AMD EPYC with bf16:
    17 minutes, 68.8 % (one seed; notebooks/results/imagenette-64px-cpu-refined.json).
    """

    ema: float = 0.99
    colour: float = 0.3


@dataclass(frozen=True)
class ImageNet(Recipe):
    """torchrun --nproc-per-node 8 -m refiner_min.train --subset imagenet --data DIR

    The published recipe without token labels (scripts/refiner_s.yaml): S at 224 px. With them (refiner_s_relabel.yaml,
    published accuracy 83.6 %): --relabel DIR --mix-token --drop-path 0.2. Neither was run by us. M and L: --model m
    --drop-path 0.2, with token labels 0.25. The learning rate 5e-4 is taken for a batch of 256 (8 x 32): our reading,
    since the number of GPUs is not published, and it is scaled with the batch.
    Different from the published code: the schedule moves every step instead of every epoch, RandAugment's magnitude
    does not vary, the warm-up starts a step above 0 instead of at 1e-6, and the cosine regulariser, whose similarity
    runs over heads by mistake, is left out.
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
    "digit-scenes": (DigitScenes, DigitScenes),
    "imagenette": (Photos, PhotosOnCPU),
    "imagewoof": (Photos, PhotosOnCPU),
    "folder": (Photos, PhotosOnCPU),
    "imagenet": (ImageNet, ImageNet),
}


def choose_recipe(subset: str, device: torch.device, given: dict, relabelled: bool = False) -> Recipe:
    """The subset's preset with the flags that were given; relabelled: with --relabel."""
    preset = PRESETS[subset][device.type == "cpu"]()
    if given.get("linear"):
        given = {"share": False} | given
    recipe = replace(preset, **given)
    shorter = min(recipe.epochs / preset.epochs, 1)
    derived = {"lr": preset.lr * recipe.batch_size / preset.batch_size,
               "warmup_epochs": preset.warmup_epochs * shorter,
               "cooldown_epochs": int(preset.cooldown_epochs * shorter), "amp": hardware.hardware_amp(device),
               "dense_weight": 0.5 if relabelled else preset.dense_weight}
    recipe = replace(recipe, **{name: value for name, value in derived.items() if given.get(name, "auto") == "auto"})
    recipe.check()
    return recipe


def build_model(recipe: Recipe, subset: data.Subset, dense: bool | None = None) -> model.RefinerViT:
    """The model of the recipe, untrained; dense: with a token head, by default where the recipe teaches it."""
    names = ("img_size", "patch_size", "refine", "share", "expand", "kernel_size", "linear", "drop_path")
    torch.manual_seed(recipe.seed)
    try:
        return MODELS[recipe.model](num_classes=len(subset.classes), in_channels=subset.channels,
                                    dense=recipe.dense_weight > 0 if dense is None else dense,
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
    """(images, Labels) -> both mixed within the batch by mixup or cutmix, one of the two at random."""
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(recipe, kind)]

    def mix(images, labels: Labels) -> tuple[torch.Tensor, Labels]:
        if not kinds:
            return images, labels
        if labels.image.ndim == 1:
            labels = labels._replace(image=F.one_hot(labels.image, num_classes).float())
        kind = kinds[int(torch.randint(len(kinds), ()))]
        lam = float(torch.distributions.Beta(*[float(getattr(recipe, kind))] * 2).sample())
        if kind == "mixup":
            return mixup(images, labels, lam)
        return cutmix(images, labels, mix_token_box(images.shape[2], lam))

    return mix


def make_augmentation(recipe: Recipe, split) -> data.Augmentation:
    area, colour = (None, 0.0) if split.cropped else ((recipe.crop_min, recipe.crop_max), recipe.colour)
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
            cuda = self.device.type == "cuda"
            values = torch.stack([loss.to(self.total), self.total[2]]).to("cpu", non_blocking=cuda)
            self.pending = values, torch.cuda.current_stream().record_event() if cuda else None
        if self.pending is not None and (self.pending[1] is None or self.pending[1].query()):
            (self.shown, bad), self.pending = self.pending[0].tolist(), None
            self.check(bad)

    def mean(self) -> float:
        """The mean loss a picture since the start; waits for the device. UserError if it was ever not finite.
        Of several processes the first one then holds all of the sums, to be saved."""
        if dist.is_initialized():
            dist.all_reduce(self.total)
        loss, count, bad = self.total.tolist()
        if dist.is_initialized() and dist.get_rank():
            self.total.zero_()
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

    def agreed(self, step: int) -> bool:
        """Whether to stop after this step; several processes ask each other now and then, and stop together."""
        if not dist.is_initialized():
            return self.signal is not None
        if step % LOOK_EVERY:
            return False
        number = torch.tensor(self.signal or 0)  # on the CPU, so that no GPU is waited for
        dist.all_reduce(number, dist.ReduceOp.MAX)
        self.signal = int(number) or None
        return self.signal is not None


# ----------------------------------------------------------------------------------------------------------------------
# A run


class Run:
    """A training run: the model, its average, the optimizer and how far they are. Everything that is random in a step
    is drawn from a seed made of the run's seed and the step, so no state of a generator needs to be kept."""

    def __init__(self, recipe: Recipe, subset: data.Subset, net: model.RefinerViT, device: torch.device, out: Path,
                 compiled: bool = False):
        self.recipe, self.device, self.out = recipe, device, out
        self.subset = replace(subset, train=subset.train.to(device), val=subset.val.to(device))
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.local_batch = recipe.batch_size // self.world  # pictures a step in this process
        self.steps_per_epoch = len(subset.train) // recipe.batch_size
        self.model = net.to(device)
        self.wrapped = DistributedDataParallel(self.model) if self.world > 1 else self.model
        self.wrapped = torch.compile(self.wrapped) if compiled else self.wrapped
        self.ema = deepcopy(self.model).eval() if recipe.ema else None
        self.averaged = [[value for value in net.state_dict().values() if value.is_floating_point()]
                         for net in (self.ema, self.model) if net is not None]
        groups = parameter_groups(self.model, recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=device.type in ("cpu", "cuda"))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule(recipe, self.steps_per_epoch))
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        self.augment = make_augmentation(recipe, subset.train)
        self.mix = make_mixing(recipe, len(subset.classes))
        self.criterion = TokenLabelLoss(recipe.dense_weight, recipe.smoothing)
        self.step, self.history, self.loss = 0, [], LossWatch(device)
        self.seconds = 0.0  # of the epoch under way, spent before an interruption

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def best_model(self) -> model.RefinerViT:
        """What is evaluated, and kept as best.pt: the average of the weights, if there is one."""
        return self.ema if self.ema is not None else self.model

    def origin(self) -> dict:
        """What is trained on what."""
        return {"subset": self.subset.name, "data": self.subset.root, "recipe": asdict(self.recipe),
                "config": asdict(self.model.config), "classes": self.subset.class_names,
                "pictures": {"train": len(self.subset.train), "val": len(self.subset.val)}, "processes": self.world,
                "relabel": self.subset.relabel, "annotator": self.subset.annotator}

    def state(self) -> dict:
        """All of the run, to go on from."""
        return {
            **self.origin(), "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(), "step": self.step, "history": self.history,
            "loss": self.loss.total, "seconds": self.seconds,
        }

    def restore(self, state: dict):
        """Go on from a state."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history, self.seconds = state["step"], state["history"], state["seconds"]
        if self.rank == 0:  # which holds the sums of all
            self.loss.total.copy_(state["loss"])

    def order(self, epoch: int) -> torch.Tensor:
        """This process's share of the epoch's pictures, batch by batch; the incomplete last batch is left out."""
        generator = torch.Generator().manual_seed(hash((self.recipe.seed, epoch)))
        order = torch.randperm(len(self.subset.train), generator=generator)
        return order[: self.steps_per_epoch * self.recipe.batch_size].view(-1, self.world)[:, self.rank]

    def train_epoch(self, stop: StopRequest, bar: tqdm):
        """Train to the end of the epoch, or to the end of the step in which stopping is asked for."""
        self.wrapped.train()
        epoch, start = divmod(self.step, self.steps_per_epoch)
        rest = self.order(epoch)[start * self.local_batch:]
        for batch in self.subset.train.epoch(rest, self.local_batch, epoch):
            torch.manual_seed(hash((self.recipe.seed, self.step, self.rank)))
            batch = self.augment(batch)
            self.train_step(*self.mix(batch.pictures, self.labels(batch)))
            bar.update(self.recipe.batch_size)
            bar.set_postfix(loss=f"{self.loss.shown:.3f}", refresh=False)
            if stop.agreed(self.step):
                return

    def labels(self, batch: data.Batch) -> Labels:
        """What an augmented batch learns from: the data set's labels, or its label maps' under the images' boxes."""
        image, tokens = batch.labels, batch.token_labels
        wanted = self.recipe.token_labels and self.recipe.dense_weight > 0
        if batch.label_map is not None:
            classes, grid = len(self.subset.classes), self.model.config.grid if wanted else 1
            image, tokens = pool_label_map(*batch.label_map, batch.boxes, classes, grid)
        return Labels(image, tokens if wanted else None)

    def train_step(self, images, labels: Labels):
        """One step on images (B, channels, S, S) and their labels."""
        grid = self.model.config.grid
        box = mix_token_box(grid, float(torch.rand(()))) if self.recipe.mix_token else None
        with hardware.autocast(self.device, self.recipe.amp):
            output = self.wrapped(images, box)
        loss = self.criterion(output, labels, box_share(box, grid) if box is not None else 0.0)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.update_average()
        self.loss.add(loss, len(images), self.step)
        self.step += 1

    def update_average(self):
        """Move the average towards the weights and BatchNorm's statistics; young, it follows them closely. torch's
        AveragedModel waits for the GPU every step, to move its counter there; so only its function is used."""
        if self.ema is not None:
            decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
            get_ema_multi_avg_fn(decay)(*self.averaged, None)

    @torch.no_grad()
    def evaluate(self) -> "Score":
        """How well the validation pictures are told apart. Without autocast."""
        net, val = self.best_model.eval(), self.subset.val
        if self.world > 1:  # each process has its own statistics in BatchNorm: the first one's count, and are saved
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)
        totals = zeros(5, self.device)  # sum of losses, right answers, pictures, right tokens, tokens with a label
        indices = torch.arange(self.rank, len(val), self.world)
        for batch in val.epoch(indices, self.local_batch):
            if val.cropped:
                images = data.normalise(batch.pictures)
            else:
                images = data.center_crop(batch.pictures, batch.aspects, self.recipe.img_size, self.recipe.eval_crop)
            output = net.forward_head(net.forward_features(images))
            logits = output.combined()
            totals[0] += F.cross_entropy(logits, batch.labels, reduction="sum")
            totals[1] += (logits.argmax(dim=1) == batch.labels).sum()
            totals[2] += len(batch.labels)
            if output.token_logits is not None and batch.token_labels is not None:
                right = output.token_logits.argmax(dim=2) == batch.token_labels.argmax(dim=2)  # (B, T)
                labelled = batch.token_labels.sum(dim=2) > 0
                totals[3] += (right & labelled).sum()
                totals[4] += labelled.sum()
        if self.world > 1:
            dist.all_reduce(totals)
        loss, right, count, tokens_right, tokens = totals.tolist()
        return Score(loss / count, int(right), int(count), tokens_right / tokens if tokens else None)


class Score(NamedTuple):
    loss: float  # the mean over the pictures
    right: int
    count: int
    token_accuracy: float | None  # over the patch tokens whose label is known; None where none is


# ----------------------------------------------------------------------------------------------------------------------
# Training, and what it leaves in the run's folder


HEADER = "epoch     step    next lr train loss  val loss accuracy seconds    img/s"
TABLE = ("{epoch:>5} {step:>8} {lr:>10.3g} {train_loss:>10.4f} {val_loss:>9.4f} {val_accuracy:>8.2%} {seconds:>7.0f} "
         "{images_per_second:>8.0f}")


def table_row(row: dict) -> str:
    tokens = f"  of tokens {row['val_token_accuracy']:.2%}" if "val_token_accuracy" in row else ""
    return TABLE.format(**row) + tokens


def fit(run: Run, arguments: list[str]) -> int:
    """Train to the end, saving after every epoch. Returns the exit status: 0, or 128 + the signal that ended it."""
    total, batch, main = run.recipe.epochs * run.steps_per_epoch, run.recipe.batch_size, run.rank == 0
    bar = tqdm(total=total * batch, initial=run.step * batch, unit="img", unit_scale=True, dynamic_ncols=True,
               disable=None if main else True)  # None: no bar where there is no terminal
    if main:
        if run.step == 0:  # a run that is killed in its first epoch can be resumed too
            checkpoint.save(run.state(), run.out / "last.pt")
        tqdm.write("\n".join([HEADER, *map(table_row, run.history)]))
    with StopRequest() as stop, bar:
        while run.step < total:
            epoch, started = run.epoch, time.perf_counter()
            run.train_epoch(stop, bar)
            loss = run.loss.mean()  # waits for the device, so that the time is right
            run.seconds += time.perf_counter() - started
            if run.epoch == epoch:  # stopped on the way
                return stopped(run, stop, arguments)
            finish_epoch(run, loss)
            if run.step < total and stop.agreed(0):
                return stopped(run, stop, arguments)
    return 0


def finish_epoch(run: Run, loss: float):
    """Evaluate, and save what the epoch came to. UserError, and nothing saved, if the weights are not finite."""
    score = run.evaluate()
    if not math.isfinite(score.loss):
        LossWatch.check(run.step)
    run.history.append({
        "epoch": run.epoch, "step": run.step, "lr": run.scheduler.get_last_lr()[0], "train_loss": loss,
        "val_loss": score.loss, "val_accuracy": score.right / score.count, "seconds": round(run.seconds, 1),
        "images_per_second": round(run.steps_per_epoch * run.recipe.batch_size / run.seconds, 1),
        **({} if score.token_accuracy is None else {"val_token_accuracy": score.token_accuracy})})
    run.loss, run.seconds = LossWatch(run.device), 0.0
    if run.rank == 0:
        tqdm.write(table_row(run.history[-1]))
        if run.history[-1]["val_accuracy"] >= max(row["val_accuracy"] for row in run.history):
            best = {**run.origin(), "model": run.best_model.state_dict(), "row": run.history[-1]}
            checkpoint.save(best, run.out / "best.pt")
        checkpoint.save(run.state(), run.out / "last.pt", backup=True)
        write_history(run)


def stopped(run: Run, stop: StopRequest, arguments: list[str]) -> int:
    """Save, say how to go on, and give the exit status of the signal."""
    if run.rank == 0:
        checkpoint.save(run.state(), run.out / "last.pt", backup=True)
        again = arguments if "--resume" in arguments else [*arguments, "--resume"]
        print(f"stopped after step {run.step}; to go on: {command_line(again)}")
    return 128 + stop.signal


def command_line(arguments: list[str]) -> str:
    """The command with these arguments, as one would type it."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    start = f"torchrun --nproc-per-node {processes}" if processes else "python"
    return f"{start} -m refiner_min.train {shlex.join(arguments)}".strip()


def write_history(run: Run):
    """metrics.csv and curves.png, anew from the history, so that they never disagree with the checkpoint."""
    lines = [",".join(run.history[0]), *(",".join(map(str, row.values())) for row in run.history)]
    with replacing(run.out / "metrics.csv") as file:
        file.write("\n".join([*lines, ""]).encode())
    title = f"{run.subset.name}, model {run.recipe.model}{'' if run.recipe.refine else ', plain ViT'}"
    plots.save_figure(plots.training_curves(run.history, title), run.out / "curves.png")


def write_config(run: Run, record: dict):
    with replacing(run.out / "config.json") as file:
        file.write(f"{json.dumps(record, indent=1)}\n".encode())


def facts(run: Run, arguments: list[str]) -> dict:
    """What config.json says: enough to run it again and to compare it."""
    return {
        "command": command_line(arguments),
        **run.origin(),
        "parameters": count_parameters(run.model),
        "hardware": hardware.describe(run.device),
        "versions": {"refiner_min": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__,
                     "python": platform.python_version()},
        "commit": package_commit(),
    }


def count_parameters(net: model.RefinerViT) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def package_commit() -> str | None:
    """The last commit that changed the package; None where there is no git or no repository of it."""
    try:
        git = subprocess.run(["git", "log", "-1", "--format=%H", "--", "."], cwd=Path(__file__).parent,
                             capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() or None


def finish(run: Run, arguments: list[str]):
    """Complete the run's folder and say where the results are."""
    write_history(run)
    best = max(run.history, key=lambda row: (row["val_accuracy"], row["epoch"]))
    result = {"training_minutes": round(sum(row["seconds"] for row in run.history) / 60, 2),
              "images_per_second": statistics.median(row["images_per_second"] for row in run.history),
              "accuracy": run.history[-1]["val_accuracy"], "best_accuracy": best["val_accuracy"],
              "best_epoch": best["epoch"], "weights": "EMA" if run.ema is not None else "last"}
    if "val_token_accuracy" in run.history[-1]:
        result["token_accuracy"] = run.history[-1]["val_token_accuracy"]
    path = run.out / "config.json"
    record = json.loads(path.read_text()) if path.exists() else facts(run, arguments)
    write_config(run, record | {"result": result})
    weights = "the weights' moving average" if run.ema is not None else "the weights"
    print(f"accuracy {result['accuracy']:.2%} with {weights} (best {result['best_accuracy']:.2%} after epoch "
          f"{best['epoch']}), {result['training_minutes']:.1f} minutes of training: {run.out}/best.pt, curves.png")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse(arguments=None) -> tuple[argparse.Namespace, dict]:
    """The command's own flags, and those of the recipe that were given."""
    parser = argparse.ArgumentParser(prog="python -m refiner_min.train", description="Train or evaluate a Refiner-ViT. "
                                     "What is not given comes from the subset's preset, and is printed first.")
    parser.add_argument("--subset", choices=data.SUBSETS, help="the data (default: digits, which is built in)")
    parser.add_argument("--data", metavar="DIR", help="folder with train/ and val/ (default: below data/, downloaded)")
    parser.add_argument("--relabel", metavar="DIR", help="learn from the label maps in this folder, not from the set's "
                        "labels; refiner_min.annotate makes them")
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/SUBSET)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one; mps is untested)")
    parser.add_argument("--workers", type=int, help="processes that read a streamed set (default: the cores)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model: slow to start, then faster")
    parser.add_argument("--skip-bad", action="store_true", help="leave out pictures that cannot be read")
    parser.add_argument("--resume", metavar="PATH", nargs="?", const="",
                        help="go on with the run in this folder (default: that of --out)")
    parser.add_argument("--weights", metavar="PATH", help="start from these weights, ours or published")
    parser.add_argument("--eval", action="store_true", help="evaluate --weights (default: best.pt of --out) and stop")
    group = parser.add_argument_group("recipe", "(each subset has its own preset, on a GPU and on a CPU)")
    for item in fields(Recipe):
        how = {"action": argparse.BooleanOptionalAction} if item.type is bool else {
            "type": item.type, "choices": item.metadata["choices"]}
        name = f"--{item.name.replace('_', '-')}"
        group.add_argument(name, default=argparse.SUPPRESS, help=item.metadata["help"], **how)
    known = vars(parser.parse_args(arguments))
    if (known["workers"] or 0) < 0:
        raise UserError(f"--workers {known['workers']} must be at least 0")
    given = {item.name: known.pop(item.name) for item in fields(Recipe) if item.name in known}
    return argparse.Namespace(**known), given


def check_saved(saved: dict, asked: dict, path):
    """UserError naming the fields in which what was asked for differs from what the file at path was made with."""
    differing = [f"{name} ({saved.get(name)} there, {value} here)" for name, value in asked.items()
                 if saved.get(name) != value]
    if differing:
        raise UserError(f"{path} was made with another configuration: {', '.join(differing)}")


def open_subset(args: argparse.Namespace, recipe: Recipe, device: torch.device) -> data.Subset:
    """Say what was chosen, then open the data; of several processes on a machine, the first one alone downloads and
    decodes."""
    local_rank, local_world = (int(os.environ.get(name, default)) for name, default in
                               (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    main = int(os.environ.get("RANK", "0")) == 0
    if main:
        processes = f", {dist.get_world_size()} processes" if dist.is_initialized() else ""
        print(f"{args.subset}: on {hardware.describe(device)}{processes}")
        print("recipe: " + ", ".join(f"{name} {value}" for name, value in asdict(recipe).items()), flush=True)
    workers = args.workers if args.workers is not None else max(min(os.cpu_count(), 16) // local_world, 1)
    transform = data.StreamAugmentation(recipe.img_size, (recipe.crop_min, min(recipe.crop_max, 1)), recipe.flip,
                                        recipe.randaugment)
    if dist.is_initialized() and local_rank:
        dist.barrier()
    subset = data.load_subset(
        args.subset, args.data, recipe.img_size, grid=recipe.img_size // recipe.patch_size, eval_crop=recipe.eval_crop,
        seed=recipe.seed, workers=workers, skip_bad=args.skip_bad, transform=transform, labels=args.relabel)
    if dist.is_initialized() and not local_rank:
        dist.barrier()
    if main:
        print(f"{len(subset.train):,} pictures to train on, {len(subset.val):,} to validate, {len(subset.classes)} "
              f"classes{subset.train.note}")
        if subset.annotator:
            print(f"labels of the training pictures and their patches: {subset.annotator}")
    return subset


def load_start(net: model.RefinerViT, state: dict, path, same_classes: bool):
    """Put the weights of state, ours or published, into net; without the same classes its heads stay new."""
    if "config" not in state:
        return checkpoint.load_released(net, state, classifier=same_classes)
    free = ("img_size", "num_classes", "drop_path", "dense")
    asked = {name: value for name, value in asdict(net.config).items() if name not in free}
    check_saved(state["config"], asked, path)
    return checkpoint.load_weights(net, state.get("ema") or state["model"], classifier=same_classes)


def new_run(args: argparse.Namespace, given: dict, device: torch.device, arguments: list[str]) -> Run:
    """A run from the preset and the flags, its folder made. UserError: the folder holds a run; nothing is written."""
    args.subset = args.subset or "digits"
    out = Path(args.out or f"runs/{args.subset}")
    recipe = choose_recipe(args.subset, device, given, relabelled=args.relabel is not None)
    try:
        held = [name for name in ("config.json", "metrics.csv", "last.pt", "best.pt") if (out / name).exists()]
    except OSError as error:
        raise UserError(f"--out {out} cannot be looked into ({error})") from None
    if held:
        raise UserError(f"{out} holds a run already ({held[0]}): --resume {out} goes on with it, --out DIR keeps both")
    state = checkpoint.load(args.weights) if args.weights else None
    subset = open_subset(args, recipe, device)
    check_batch(recipe, subset)
    net = build_model(recipe, subset)
    if state is not None:
        same = state["classes"] == subset.class_names if "config" in state else len(subset.classes) == 1000
        load_start(net, state, args.weights, same)
    run = Run(recipe, subset, net, device, out, args.compile)
    if run.rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out} cannot be made ({error})") from None
        write_config(run, facts(run, arguments))
    return run


def check_batch(recipe: Recipe, subset: data.Subset):
    world = dist.get_world_size() if dist.is_initialized() else 1
    if recipe.batch_size > len(subset.train):
        raise UserError(f"--batch-size {recipe.batch_size} is larger than the {len(subset.train)} training pictures")
    if recipe.batch_size % world:
        raise UserError(f"--batch-size {recipe.batch_size} must be a multiple of the {world} processes")


def saved_recipe(state: dict, path) -> Recipe:
    """The recipe that the file at path was made with. UserError: one that this version does not know."""
    try:
        return Recipe(**state["recipe"])
    except TypeError as error:
        raise UserError(f"{path} was written by another version of refiner_min ({error})") from None


def resumed_run(args: argparse.Namespace, given: dict, device: torch.device) -> Run:
    """The run that is to go on. UserError: no such run, or flags and data that are not its own."""
    path = Path(args.resume or args.out or f"runs/{args.subset or 'digits'}")
    path = path if path.suffix == ".pt" else path / "last.pt"
    if args.weights or (args.out and Path(args.out) != path.parent):
        raise UserError(f"--resume {path} has its own weights and folder: leave out --weights and --out")
    state = checkpoint.load(path)
    if "optimizer" not in state or "recipe" not in state:
        raise UserError(f"{path} is no checkpoint to go on from: --resume takes the folder of a run or its last.pt")
    args.subset, args.data = args.subset or state["subset"], args.data or state["data"]
    args.relabel = args.relabel or state.get("relabel")
    check_saved({"subset": state["subset"], **state["recipe"]}, {"subset": args.subset, **given}, path)
    recipe = saved_recipe(state, path)
    subset = open_subset(args, recipe, device)
    run = Run(recipe, subset, build_model(recipe, subset), device, path.parent, args.compile)
    check_saved(state, {name: run.origin()[name] for name in ("classes", "pictures", "processes", "annotator")
                         if name in state}, path)
    run.restore(state)
    return run


def evaluate(args: argparse.Namespace, given: dict, device: torch.device):
    """Print the accuracy of saved weights, ours or published. Writes nothing."""
    if args.relabel:
        raise UserError("--relabel does not go with --eval: validation pictures have no label maps")
    path = Path(args.weights or Path(args.out or f"runs/{args.subset or 'digits'}") / "best.pt")
    state = checkpoint.load(path)
    ours = "config" in state
    args.subset = args.subset or (state["subset"] if ours else "digits")
    if ours:
        args.data = args.data or (state["data"] if args.subset == state["subset"] else None)
        recipe = replace(saved_recipe(state, path), **given)
        recipe.check()
    else:
        recipe = choose_recipe(args.subset, device, given)
    subset = open_subset(args, recipe, device)
    if ours and state["classes"] != subset.class_names:
        raise UserError(f"{path} knows {', '.join(state['classes'][:3])}, ..., not the classes of {args.subset}")
    net = build_model(recipe, subset, dense=None if ours else True)  # the published models evaluate with both heads
    load_start(net, state, path, same_classes=True)
    run = Run(replace(recipe, ema=0.0), subset, net, device, path.parent)
    score = run.evaluate()
    if run.rank == 0:
        tokens = f", of tokens {score.token_accuracy:.4%}" if score.token_accuracy is not None else ""
        print(f"accuracy {score.right / score.count:.4%} ({score.right} of {score.count}){tokens}, "
              f"loss {score.loss:.4f}")


def main(arguments=None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args, given = parse(arguments)
    device = hardware.choose_device(args.device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # started by torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        if args.eval:
            evaluate(args, given, device)
            return 0
        resumes = args.resume is not None
        run = resumed_run(args, given, device) if resumes else new_run(args, given, device, arguments)
        if run.rank == 0:
            config = run.model.config
            kind = "linear refinement" if config.linear else "refined" if config.refine else "plain ViT"
            print(f"model {run.recipe.model}: {kind}, {count_parameters(run.model):,} parameters, "
                  f"{config.img_size} px in {config.grid**2} patches", flush=True)
        status = fit(run, arguments)
        if status == 0 and run.rank == 0:
            finish(run, arguments)
        return status
    except torch.OutOfMemoryError:
        raise UserError("the GPU's memory is too small: try a smaller --batch-size or --img-size") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
