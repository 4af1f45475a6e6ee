"""A run: the step, the epoch, the average of the weights, and what is saved to go on from.

The pieces stand in the order in which training uses them. Source of the steps: timm's training script as the published
code runs it; the code is ours.
It imports model, data, augment, relabel, recipes, checkpoint, foreign, evaluation, records, stopping, hardware and
distributed.
"""

import math
import time
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from refiner_min import UserError, checkpoint, distributed, hardware, records, seed_for
from refiner_min.augment import Augmentation, Batch, StreamAugmentation, erase
from refiner_min.data import Subset
from refiner_min.evaluation import evaluate
from refiner_min.foreign import check_alike, check_fields
from refiner_min.model import RefinerViT
from refiner_min.recipes import VERSION, Recipe, schedule
from refiner_min.relabel import Labels, TokenLabelLoss, box_share, cutmix, mix_token_box, mixup, pool_label_map
from refiner_min.stopping import SaveClock, StopRequest

LOSS_HINT = ("training stopped and the last good checkpoint was kept: a run in another --out with a smaller --lr or a "
             "longer --warmup-epochs usually helps")
LOOK_EVERY = 20  # steps between two looks at the loss


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


def make_stream_augmentation(recipe: Recipe) -> StreamAugmentation:
    """What the workers of a streamed set do to a picture."""
    return StreamAugmentation(recipe.img_size, (recipe.crop_min, recipe.crop_max), recipe.flip, recipe.randaugment)


def make_augmentation(recipe: Recipe, split) -> Augmentation:
    """What is done to a batch on its device."""
    area = None if split.cropped else (recipe.crop_min, recipe.crop_max)
    return Augmentation(recipe.img_size, area, flip=recipe.flip, turn=recipe.turn, colour=recipe.colour)


class LossWatch:
    """Sums the loss where it is computed. What it shows is a few steps old on a GPU, which is never waited for."""

    def __init__(self, device):
        self.device = device
        self.total = torch.zeros(2, dtype=hardware.widest_float(device), device=device)  # sum of losses, pictures
        self.bad = torch.full((), math.inf, device=device)  # the first step whose loss was not finite
        self.shown, self.pending = math.nan, None

    def add(self, loss, count: int, step: int):
        loss = loss.detach()
        self.total += torch.stack([loss * count, torch.full_like(loss, count)])
        self.bad = torch.where(loss.isfinite(), self.bad, self.bad.clamp(max=step))
        if self.pending is None and (step % LOOK_EVERY == 0 or self.device.type == "cpu"):
            cuda = self.device.type == "cuda"
            values = torch.stack([loss.to(self.bad), self.bad]).to("cpu", non_blocking=cuda)
            self.pending = values, torch.cuda.current_stream().record_event() if cuda else None
        if self.pending is not None and (self.pending[1] is None or self.pending[1].query()):
            (self.shown, bad), self.pending = self.pending[0].tolist(), None
            self.check(bad)

    def mean(self) -> float:
        """The mean loss a picture since the start; waits for the device. UserError if it was ever not finite.
        Of several processes the first one then holds all of the sums, to be saved."""
        self.check(float(distributed.smallest_over_processes(self.bad)))
        loss, count = distributed.sum_over_processes(self.total).tolist()
        if not distributed.is_main():
            self.total.zero_()
        return loss / count

    @staticmethod
    def check(bad: float):
        if bad < math.inf:
            raise UserError(f"the loss was not finite at step {int(bad)}; {LOSS_HINT}")


# ----------------------------------------------------------------------------------------------------------------------
# A run


class Run:
    """A training run: the model, its average, the optimizer and how far they are. Everything that is random in a step
    is drawn from a seed made of the run's seed and the step, so no state of a generator needs to be kept."""

    def __init__(self, recipe: Recipe, subset: Subset, net: RefinerViT, device: torch.device, out: Path,
                 compiled: bool = False, eval_batch: int | None = None):
        self.recipe, self.device, self.out = recipe, device, out
        self.subset = replace(subset, train=subset.train.to(device), val=subset.val.to(device))
        self.rank, self.world = distributed.rank(), distributed.world()
        self.local_batch = recipe.batch_size // self.world  # pictures a step in this process
        self.eval_batch = eval_batch or self.local_batch
        self.steps_per_epoch = len(subset.train) // recipe.batch_size
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if recipe.sync_bn and self.world > 1 else net
        self.model = net.to(device)
        self.settings = hardware.set_up_training(self.model, device, recipe.amp)
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
        self.seconds, self.since = 0.0, time.perf_counter()  # of the epoch under way until then

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
        return f"{self.subset.name}, model {self.recipe.model}, {self.model.config.depth} blocks, {self.kind}"

    @property
    def kind(self) -> str:
        config = self.model.config
        if not config.refine:
            return "plain ViT"
        return "maps shared, not refined" if config.unrefined else "linear refinement" if config.linear else "refined"

    def origin(self) -> dict:
        """What is trained on what."""
        return {"subset": self.subset.name, "data": self.subset.root, "recipe_version": VERSION,
                "recipe": asdict(self.recipe), "config": asdict(self.model.config), "classes": self.subset.class_names,
                "pictures": {"train": len(self.subset.train), "val": len(self.subset.val)}, "processes": self.world,
                "storage": self.subset.storage, "relabel": self.subset.relabel, "annotator": self.subset.annotator}

    def state(self) -> dict:
        """All of the run, to go on from."""
        return {
            **self.origin(), "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(), "step": self.step, "history": self.history,
            "loss": self.loss.total, "seconds": self.seconds,
        }

    def check(self, state: dict):
        """ValueError naming what of a state, whose fields checkpoint.check has seen, is not of this run's form."""
        check_fields(state["optimizer"], {"state": dict}, ["state"])
        check_fields(state["scheduler"], {"last_epoch": int}, ["last_epoch"])
        moments = {index: {"step": torch.tensor(0.0), "exp_avg": parameter, "exp_avg_sq": parameter}
                   for index, parameter in self.numbered_parameters() if index in state["optimizer"]["state"]}
        here = {"model": self.model.state_dict(), "ema": self.ema.state_dict() if self.ema is not None else None,
                "optimizer": moments, "scaler": self.scaler.state_dict(), "loss": self.loss.total.to(state["loss"])}
        there = {name: state[name] for name in here} | {"optimizer": state["optimizer"]["state"]}
        check_alike(there, here, "its state")
        step, history, total = state["step"], state["history"], self.recipe.epochs * self.steps_per_epoch
        if not 0 <= state["scheduler"]["last_epoch"] <= step <= total:
            raise ValueError(f"it is at step {step} of {total}")
        if len(history) != step // self.steps_per_epoch or any(row.keys() != history[0].keys() for row in history):
            raise ValueError(f"its history is not that of {step // self.steps_per_epoch} epochs")
        for row in history:
            check_fields(row, {name: float for name in records.ROW}, records.ROW)

    def numbered_parameters(self):
        """The parameters, by the numbers that the optimizer's state gives them."""
        return enumerate(value for group in self.optimizer.param_groups for value in group["params"])

    @torch.no_grad()
    def restore(self, state: dict):
        """Go on from a state. ValueError, and nothing is restored: as check's."""
        self.check(state)
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        moments = state["optimizer"]["state"]
        for index, parameter in self.numbered_parameters():
            for name in moments.get(index, {}).keys() - {"step"}:  # in memory as the parameter: on a GPU others lie so
                moments[index][name] = torch.empty_like(parameter).copy_(moments[index][name])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(  # sets the learning rate, too
            self.optimizer, schedule(self.recipe, self.steps_per_epoch), state["scheduler"]["last_epoch"] - 1)
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history, self.seconds = state["step"], state["history"], state["seconds"]
        if self.rank == 0:  # which holds the sums of all
            self.loss.total.copy_(state["loss"])

    def order(self, epoch: int) -> torch.Tensor:
        """This process's share of the epoch's pictures, batch by batch; the incomplete last batch is left out."""
        generator = torch.Generator().manual_seed(seed_for("order", self.recipe.seed, epoch))
        order = torch.randperm(len(self.subset.train), generator=generator)
        return order[: self.steps_per_epoch * self.recipe.batch_size].view(-1, self.world)[:, self.rank]

    def train_epoch(self, stop: StopRequest, bar: tqdm, clock: SaveClock):
        """Train to the end of the epoch, or to the end of the step in which stopping is asked for."""
        self.wrapped.train()
        self.since = time.perf_counter()
        epoch, start = divmod(self.step, self.steps_per_epoch)
        rest = self.order(epoch)[start * self.local_batch:]
        for batch in self.subset.train.epoch(rest, self.local_batch, epoch):
            self.train_batch(batch)
            bar.update(self.recipe.batch_size)
            bar.set_postfix(loss=f"{self.loss.shown:.3f}", refresh=False)
            if stop.agreed(self.step):
                return
            if clock.due(self.step) and self.step % self.steps_per_epoch:  # after the last one it is evaluated first
                self.count_up()
                self.save(clock)

    def count_up(self) -> float:
        """The mean loss of the epoch so far, and the seconds spent on it; waits for the device. Of several processes
        the first one holds the sums then. UserError: the loss was not finite."""
        loss, now = self.loss.mean(), time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now
        return loss

    def save(self, clock: SaveClock):
        """What to go on from, as last.pt; the file before it stays as its backup."""
        if self.rank == 0:
            checkpoint.save(self.state(), self.out / "last.pt", backup=True)
        clock.restart()

    def train_batch(self, batch: Batch):
        """One step on a batch of the training split."""
        torch.manual_seed(seed_for("step", self.recipe.seed, self.step, self.rank))
        batch = self.augment(batch)
        images, labels = self.mix(batch.pictures, self.labels(batch))
        self.train_step(erase(images, self.recipe.erasing) if self.recipe.erasing else images, labels)

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
            output = self.wrapped(images, None if box is None else torch.tensor(box))
        loss = self.criterion(output, labels, 0.0 if box is None else box_share(box, grid))
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if self.update_weights():
            self.scheduler.step()
            self.update_average()
        self.loss.add(loss, len(images), self.step)
        self.step += 1

    def update_weights(self) -> bool:
        """The optimizer's step; False if fp16's scaler left it out, because a gradient was not finite."""
        if self.recipe.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        before = self.scaler.get_scale()  # waits for a GPU in fp16 only: else it is 1
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before

    def update_average(self):
        """Move the average towards the weights and BatchNorm's statistics; young, it follows them closely. torch's
        AveragedModel waits for the GPU every step, to move its counter there; so only its function is used."""
        if self.ema is not None:
            decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
            get_ema_multi_avg_fn(decay)(*self.averaged, None)

    def evaluate(self, net: RefinerViT | None = None):
        """The evaluation.Score of net, or else of best_model."""
        return evaluate(net or self.best_model, self.subset.val, self.device, self.eval_batch)


# ----------------------------------------------------------------------------------------------------------------------
# Training to the end


def fit(run: Run, go_on: str, save_every: float = 20.0) -> int:
    """Train to the end, saving after every epoch and every so many minutes. Returns the exit status: 0, or 128 + the
    signal that ended it. go_on: the command that resumes the run, to be printed if it is stopped."""
    total, batch, main = run.recipe.epochs * run.steps_per_epoch, run.recipe.batch_size, run.rank == 0
    bar = tqdm(total=total * batch, initial=run.step * batch, unit="img", unit_scale=True, dynamic_ncols=True,
               disable=None if main else True)  # None: no bar where there is no terminal
    if main:
        tqdm.write("\n".join([records.HEADER, *map(records.table_row, run.history)]))
    clock = SaveClock(save_every)
    with StopRequest() as stop, bar:
        while run.step < total:
            epoch = run.epoch
            run.train_epoch(stop, bar, clock)
            loss = run.count_up()
            if run.epoch == epoch:  # stopped on the way
                return stopped(run, stop, clock, go_on)
            finish_epoch(run, loss, clock)
            if run.step < total and stop.agreed(0):
                return stopped(run, stop, clock, go_on)
    return 0


def finish_epoch(run: Run, loss: float, clock: SaveClock):
    """Evaluate, and save what the epoch came to. UserError, and nothing saved, if the weights are not finite."""
    score = run.evaluate()
    if not math.isfinite(score.loss):
        raise UserError(f"the validation loss was not finite after epoch {run.epoch}; {LOSS_HINT}")
    row = {"epoch": run.epoch, "step": run.step, "lr": run.scheduler.get_last_lr()[0], "train_loss": loss,
           "val_loss": score.loss, "val_accuracy": score.accuracy, "seconds": round(run.seconds, 1),
           "images_per_second": round(run.steps_per_epoch * run.recipe.batch_size / run.seconds, 1)}
    if score.token_accuracy is not None:
        row["val_token_accuracy"] = score.token_accuracy
    if run.ema is not None:
        row["val_accuracy_raw"] = run.evaluate(run.model).accuracy  # of the weights themselves
    run.history.append(row)
    run.loss, run.seconds = LossWatch(run.device), 0.0
    if run.rank == 0:
        tqdm.write(records.table_row(row))
        if row["val_accuracy"] >= max(row["val_accuracy"] for row in run.history):
            kind = "model" if run.ema is None else "ema"
            checkpoint.save({**run.origin(), kind: run.best_model.state_dict(), "row": row}, run.out / "best.pt")
        records.write_history(run.out, run.history, run.title)
    run.save(clock)


def stopped(run: Run, stop: StopRequest, clock: SaveClock, go_on: str) -> int:
    """Save, say how to go on, and give the exit status of the signal."""
    run.save(clock)
    if run.rank == 0:
        print(f"stopped after step {run.step}; to go on: {go_on}")
    return 128 + stop.signal
