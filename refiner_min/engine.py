"""A run: the step, the epoch, the average of the weights, evaluation, stopping, and what is saved to go on from.

The pieces stand in the order in which training uses them. Source of the steps: timm's training script as the published
code runs it; the code is ours.
It imports data, augment, relabel, recipes, checkpoint, records, hardware and distributed.
"""

import math
import signal
import time
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from refiner_min import UserError, checkpoint, distributed, hardware, records, seed_for
from refiner_min.augment import Augmentation, Batch, center_crop, normalise
from refiner_min.data import Subset
from refiner_min.model import RefinerViT
from refiner_min.recipes import Recipe, schedule
from refiner_min.relabel import Labels, TokenLabelLoss, box_share, cutmix, mix_token_box, mixup, pool_label_map

LOOK_EVERY = 20  # steps between two looks at the loss and, with several processes, at a request to stop


# ----------------------------------------------------------------------------------------------------------------------
# The pieces of a step


def parameter_groups(network, weight_decay: float) -> list[dict]:
    """Decay on matrices and kernels; none on biases, norms, scales, the class token and the positions (as timm's)."""
    decay, rest = [], []
    for name, parameter in network.named_parameters():
        keep = parameter.ndim <= 1 or name in ("class_token", "position")
        (rest if keep else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


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


def make_augmentation(recipe: Recipe, split) -> Augmentation:
    area, colour = (None, 0.0) if split.cropped else ((recipe.crop_min, recipe.crop_max), recipe.colour)
    return Augmentation(recipe.img_size, area, flip=recipe.flip, turn=recipe.turn, colour=colour,
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
        loss, count, bad = distributed.sum_over_processes(self.total).tolist()
        if not distributed.is_main():
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
        if distributed.world() > 1:
            if step % LOOK_EVERY:
                return False
            self.signal = distributed.largest_over_processes(self.signal or 0) or None
        return self.signal is not None


# ----------------------------------------------------------------------------------------------------------------------
# A run


class Run:
    """A training run: the model, its average, the optimizer and how far they are. Everything that is random in a step
    is drawn from a seed made of the run's seed and the step, so no state of a generator needs to be kept."""

    def __init__(self, recipe: Recipe, subset: Subset, net: RefinerViT, device: torch.device, out: Path,
                 compiled: bool = False):
        self.recipe, self.device, self.out = recipe, device, out
        self.subset = replace(subset, train=subset.train.to(device), val=subset.val.to(device))
        self.rank, self.world = distributed.rank(), distributed.world()
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
    def best_model(self) -> RefinerViT:
        """What is evaluated, and kept as best.pt: the average of the weights, if there is one."""
        return self.ema if self.ema is not None else self.model

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def title(self) -> str:
        return f"{self.subset.name}, model {self.recipe.model}{'' if self.recipe.refine else ', plain ViT'}"

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
        generator = torch.Generator().manual_seed(seed_for("order", self.recipe.seed, epoch))
        order = torch.randperm(len(self.subset.train), generator=generator)
        return order[: self.steps_per_epoch * self.recipe.batch_size].view(-1, self.world)[:, self.rank]

    def train_epoch(self, stop: StopRequest, bar: tqdm):
        """Train to the end of the epoch, or to the end of the step in which stopping is asked for."""
        self.wrapped.train()
        epoch, start = divmod(self.step, self.steps_per_epoch)
        rest = self.order(epoch)[start * self.local_batch:]
        for batch in self.subset.train.epoch(rest, self.local_batch, epoch):
            torch.manual_seed(seed_for("step", self.recipe.seed, self.step, self.rank))
            batch = self.augment(batch)
            self.train_step(*self.mix(batch.pictures, self.labels(batch)))
            bar.update(self.recipe.batch_size)
            bar.set_postfix(loss=f"{self.loss.shown:.3f}", refresh=False)
            if stop.agreed(self.step):
                return

    def labels(self, batch: Batch) -> Labels:
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

    def evaluate(self) -> "Score":
        return evaluate(self.best_model, self.subset.val, self.device, self.local_batch, self.recipe.eval_crop)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


class Score(NamedTuple):
    loss: float  # the mean over the pictures
    right: int
    count: int
    token_accuracy: float | None  # over the patch tokens whose label is known; None where none is

    @property
    def accuracy(self) -> float:
        return self.right / self.count


@torch.no_grad()
def evaluate(net: RefinerViT, split, device: torch.device, batch_size: int, crop: float = 1.0) -> Score:
    """How well the model, which is on the device, tells the split's pictures apart. Without autocast.
    batch_size: of one process; crop: the share of the shorter side that is looked at (decoded sets)."""
    net, split = net.eval(), split.to(device)
    distributed.take_from_first(net.buffers())  # each process has its own statistics in BatchNorm
    totals = zeros(5, device)  # sum of losses, right answers, pictures, right tokens, tokens with a label
    indices = torch.arange(distributed.rank(), len(split), distributed.world())
    for batch in split.epoch(indices, batch_size):
        if split.cropped:
            images = normalise(batch.pictures)
        else:
            images = center_crop(batch.pictures, batch.aspects, net.config.img_size, crop)
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
    loss, right, count, tokens_right, tokens = distributed.sum_over_processes(totals).tolist()
    return Score(loss / count, int(right), int(count), tokens_right / tokens if tokens else None)


# ----------------------------------------------------------------------------------------------------------------------
# Training to the end


def fit(run: Run, go_on: str) -> int:
    """Train to the end, saving after every epoch. Returns the exit status: 0, or 128 + the signal that ended it.
    go_on: the command that resumes the run, to be printed if it is stopped."""
    total, batch, main = run.recipe.epochs * run.steps_per_epoch, run.recipe.batch_size, run.rank == 0
    bar = tqdm(total=total * batch, initial=run.step * batch, unit="img", unit_scale=True, dynamic_ncols=True,
               disable=None if main else True)  # None: no bar where there is no terminal
    if main:
        if run.step == 0:  # a run that is killed in its first epoch can be resumed too
            checkpoint.save(run.state(), run.out / "last.pt")
        tqdm.write("\n".join([records.HEADER, *map(records.table_row, run.history)]))
    with StopRequest() as stop, bar:
        while run.step < total:
            epoch, started = run.epoch, time.perf_counter()
            run.train_epoch(stop, bar)
            loss = run.loss.mean()  # waits for the device, so that the time is right
            run.seconds += time.perf_counter() - started
            if run.epoch == epoch:  # stopped on the way
                return stopped(run, stop, go_on)
            finish_epoch(run, loss)
            if run.step < total and stop.agreed(0):
                return stopped(run, stop, go_on)
    return 0


def finish_epoch(run: Run, loss: float):
    """Evaluate, and save what the epoch came to. UserError, and nothing saved, if the weights are not finite."""
    score = run.evaluate()
    if not math.isfinite(score.loss):
        LossWatch.check(run.step)
    run.history.append({
        "epoch": run.epoch, "step": run.step, "lr": run.scheduler.get_last_lr()[0], "train_loss": loss,
        "val_loss": score.loss, "val_accuracy": score.accuracy, "seconds": round(run.seconds, 1),
        "images_per_second": round(run.steps_per_epoch * run.recipe.batch_size / run.seconds, 1),
        **({} if score.token_accuracy is None else {"val_token_accuracy": score.token_accuracy})})
    run.loss, run.seconds = LossWatch(run.device), 0.0
    if run.rank == 0:
        tqdm.write(records.table_row(run.history[-1]))
        if run.history[-1]["val_accuracy"] >= max(row["val_accuracy"] for row in run.history):
            best = {**run.origin(), "model": run.best_model.state_dict(), "row": run.history[-1]}
            checkpoint.save(best, run.out / "best.pt")
        checkpoint.save(run.state(), run.out / "last.pt", backup=True)
        records.write_history(run.out, run.history, run.title)


def stopped(run: Run, stop: StopRequest, go_on: str) -> int:
    """Save, say how to go on, and give the exit status of the signal."""
    if run.rank == 0:
        checkpoint.save(run.state(), run.out / "last.pt", backup=True)
        print(f"stopped after step {run.step}; to go on: {go_on}")
    return 128 + stop.signal
