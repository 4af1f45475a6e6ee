"""A run: the step, the epoch, the average of the weights, and what is saved to go on from.

Its parts stand in the order in which training uses them. Source of the steps: timm's training script as the published
code runs it; the code is ours.
It imports model, data, augment, relabel, recipes, checkpoint, foreign, evaluation, memory, step, records, stopping,
hardware and distributed.
"""

import math
import time
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from refiner_min import UserError, checkpoint, distributed, hardware, records, seed_for
from refiner_min.augment import Batch, erase
from refiner_min.data import Subset
from refiner_min.evaluation import evaluate
from refiner_min.foreign import check_alike, check_fields
from refiner_min.memory import recompute_maps, statistics_kept
from refiner_min.model import RefinerViT
from refiner_min.recipes import VERSION, Recipe, scale_refinements, schedule
from refiner_min.relabel import Labels, TokenLabelLoss, box_share, mix_token_box, pool_label_map
from refiner_min.step import LOSS_HINT, LossWatch, make_augmentation, make_mixing, parameter_groups
from refiner_min.stopping import SaveClock, StopRequest


class Run:
    """A training run: the model, its average, the optimizer and how far they are. Everything that is random in a step
    is drawn from a seed made of the run's seed and the step, so no state of a generator needs to be kept.
    accumulate: this process takes the shares of so many, one after the other, before it moves the weights."""

    def __init__(self, recipe: Recipe, subset: Subset, net: RefinerViT, device: torch.device, out: Path,
                 eval_batch: int | None = None, accumulate: int = 1, checkpoint_maps: bool = False):
        self.recipe, self.device, self.out = recipe, device, out
        self.subset = replace(subset, train=subset.train.to(device), val=subset.val.to(device))
        self.rank, self.world, self.accumulate = distributed.rank(), distributed.world(), accumulate
        self.local_batch = recipe.batch_size // (self.world * accumulate)  # pictures at once in this process
        self.eval_batch = eval_batch or self.local_batch
        self.steps_per_epoch = len(subset.train) // recipe.batch_size
        scale_refinements(net, recipe)
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if recipe.sync_bn and self.world > 1 else net
        self.model = net.to(device)
        self.settings = hardware.set_up_training(self.model, device, recipe.amp)
        self.wrapped = DistributedDataParallel(self.model) if self.world > 1 else self.model
        self.compiled, self.checkpoint_maps = False, checkpoint_maps  # compiled: the wrapped one, by compiling.settled
        self.ema = deepcopy(self.model).eval() if recipe.ema else None
        if checkpoint_maps:
            recompute_maps(self.model)
        self.averaged = [[value for value in net.state_dict().values() if value.is_floating_point()]
                         for net in (self.ema, self.model) if net is not None]
        groups = parameter_groups(self.model, recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=device.type in ("cpu", "cuda"))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule(recipe, self.steps_per_epoch))
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        self.augment = make_augmentation(recipe, subset.train)
        self.mix = make_mixing(recipe, len(subset.classes))
        self.criterion = TokenLabelLoss(recipe.dense_weight, recipe.smoothing)
        self.step, self.part, self.history, self.loss = 0, 0, [], LossWatch(device)  # part: of a step, of accumulate
        self.seconds, self.since = 0.0, time.perf_counter()  # of training since the last validation, until then

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
                "accumulate": self.accumulate, "compiled": self.compiled, "storage": self.subset.storage,
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
        epochs = step // self.steps_per_epoch
        if len(history) != self.validations(epochs) or any(row.keys() != history[0].keys() for row in history):
            raise ValueError(f"its history is not that of {epochs} epochs")
        for row in history:
            check_fields(row, {name: float for name in records.ROW}, records.ROW)

    def validations(self, epochs: int) -> int:
        """How many there are in so many epochs from the start."""
        whole, rest = divmod(epochs, self.recipe.validate_every)
        return whole + (rest > 0 and epochs == self.recipe.epochs)

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
        """This process's share of the epoch's pictures, batch by batch; the incomplete last batch is left out. With
        accumulate it is the shares of several, each step's one after the other."""
        generator = torch.Generator().manual_seed(seed_for("order", self.recipe.seed, epoch))
        order = torch.randperm(len(self.subset.train), generator=generator)
        order = order[: self.steps_per_epoch * self.recipe.batch_size]
        shares = order.view(self.steps_per_epoch, -1, self.world, self.accumulate)
        return shares[:, :, self.rank].transpose(1, 2).flatten()

    def train_epoch(self, stop: StopRequest, bar: tqdm, clock: SaveClock, log: records.StepLog):
        """Train to the end of the epoch, or to the end of the step in which stopping is asked for."""
        self.wrapped.train()
        self.since = time.perf_counter()
        epoch, start = divmod(self.step, self.steps_per_epoch)
        rest = self.order(epoch)[start * self.local_batch * self.accumulate:]
        for batch in log.timed(self.subset.train.epoch(rest, self.local_batch, epoch)):
            self.train_batch(batch)
            if self.part:
                continue
            log.note()
            bar.update(self.recipe.batch_size)
            bar.set_postfix(loss=f"{self.loss.shown:.3f}", refresh=False)
            if stop.agreed():
                return
            if clock.due(self.step) and self.step % self.steps_per_epoch:  # after the last one it is evaluated first
                self.count_up()
                self.save(clock)

    def count_up(self) -> float:
        """The mean loss since the last validation, and the seconds spent; waits for the device. Of several processes
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
        """One step on a batch of the training split, or a part of one."""
        share = self.rank * self.accumulate + self.part
        torch.manual_seed(seed_for("step", self.recipe.seed, self.step, share))
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
        """One step on images (B, channels, S, S) and their labels; of accumulate parts the last one moves the weights.
        """
        if self.part == 0:
            self.optimizer.zero_grad()
        last = self.part + 1 == self.accumulate
        with ExitStack() as within:
            if self.part:  # BatchNorm counts the first share, as that of the first of several processes
                within.enter_context(statistics_kept(self.model))
            if not last and self.world > 1:  # gradients meet in the last part
                within.enter_context(self.wrapped.no_sync())
            loss = self.loss_of(images, labels)
            self.scaler.scale(loss / self.accumulate).backward()
        self.loss.add(loss, len(images), self.step)
        self.part = 0 if last else self.part + 1
        if last:
            if self.update_weights():
                self.scheduler.step()
                self.update_average()
            self.step += 1

    def loss_of(self, images, labels: Labels) -> torch.Tensor:
        """The mean loss of the images."""
        grid = self.model.config.grid
        box = mix_token_box(grid, float(torch.rand(()))) if self.recipe.mix_token else None
        with hardware.autocast(self.device, self.recipe.amp):
            output = self.wrapped(images, None if box is None else torch.tensor(box))
        return self.criterion(output, labels, 0.0 if box is None else box_share(box, grid))

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
        """The evaluation.Score of best_model, in float32; or of another net, in the run's number format."""
        amp = "off" if net is None else self.recipe.amp
        return evaluate(net or self.best_model, self.subset.val, self.device, self.eval_batch, amp)


# ----------------------------------------------------------------------------------------------------------------------
# Training to the end


def fit(run: Run, go_on: str, save_every: float, log: records.StepLog) -> int:
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
            run.train_epoch(stop, bar, clock, log)
            loss = run.count_up()
            if run.epoch == epoch:  # stopped on the way
                return stopped(run, stop, clock, go_on)
            if run.validations(run.epoch) > len(run.history):
                validate(run, loss)
                log.show("epochs", run.history[-1])
            run.save(clock)
            if run.step < total and stop.agreed():
                return stopped(run, stop, clock, go_on)
    return 0


def validate(run: Run, loss: float):
    """Evaluate, and note what the epochs since the last time came to. loss: their mean training loss. UserError, and
    nothing noted, if the weights are not finite."""
    score = run.evaluate()
    if not math.isfinite(score.loss):
        raise UserError(f"the validation loss was not finite after epoch {run.epoch}; {LOSS_HINT}")
    steps = run.step - (run.history[-1]["step"] if run.history else 0)
    row = {"epoch": run.epoch, "step": run.step, "lr": run.scheduler.get_last_lr()[0], "train_loss": loss,
           "val_loss": score.loss, "val_accuracy": score.accuracy, "seconds": round(run.seconds, 1),
           "images_per_second": round(steps * run.recipe.batch_size / run.seconds, 1)}
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


def stopped(run: Run, stop: StopRequest, clock: SaveClock, go_on: str) -> int:
    """Save, say how to go on, and give the exit status of the signal."""
    run.save(clock)
    if run.rank == 0:
        print(f"stopped after step {run.step}; to go on: {go_on}")
    return 128 + stop.signal
