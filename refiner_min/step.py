"""The pieces of a step, which a run is given by its recipe: parameter groups, mixing, augmentation, the watched loss.

Source: timm's training script as the published code runs it; the code is ours.
It imports augment, relabel, recipes, hardware and distributed.
"""

import math

import torch
import torch.nn.functional as F

from refiner_min import UserError, distributed, hardware
from refiner_min.augment import Augmentation, StreamAugmentation
from refiner_min.recipes import Recipe
from refiner_min.relabel import Labels, cutmix, mix_token_box, mixup

LOSS_HINT = ("training stopped and the last good checkpoint was kept: a run in another --out with a smaller --lr or a "
             "longer --warmup-epochs usually helps")
LOOK_EVERY = 20  # steps between two looks at the loss


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
    return StreamAugmentation(recipe.img_size, (recipe.crop_min, recipe.crop_max), recipe.flip, recipe.randaugment,
                              recipe.draft)


def make_augmentation(recipe: Recipe, split) -> Augmentation:
    """What is done to a batch on its device."""
    area = None if split.cropped else (recipe.crop_min, recipe.crop_max)
    return Augmentation(recipe.img_size, area, flip=recipe.flip, turn=recipe.turn, colour=recipe.colour)


class LossWatch:
    """Sums the loss where it is computed. What it shows is a few steps old on a GPU, which is never waited for."""

    def __init__(self, device):
        self.device = device
        self.total = torch.zeros(2, dtype=hardware.widest_float(device), device=device)  # sum of losses, pictures
        self.newest = torch.zeros_like(self.total)  # of these what was not asked for yet
        self.bad = torch.full((), math.inf, device=device)  # the first step whose loss was not finite
        self.shown, self.pending = math.nan, None

    def add(self, loss, count: int, step: int):
        loss = loss.detach()
        loss_and_count = torch.stack([loss * count, torch.full_like(loss, count)])
        self.total += loss_and_count
        self.newest += loss_and_count
        self.bad = torch.where(loss.isfinite(), self.bad, self.bad.clamp(max=step))
        if self.pending is None and (step % LOOK_EVERY == 0 or self.device.type == "cpu"):
            cuda = self.device.type == "cuda"
            values = torch.stack([loss.to(self.bad), self.bad]).to("cpu", non_blocking=cuda)
            self.pending = values, torch.cuda.current_stream().record_event() if cuda else None
        if self.pending is not None and (self.pending[1] is None or self.pending[1].query()):
            (self.shown, bad), self.pending = self.pending[0].tolist(), None
            self.check(bad)

    def recent(self) -> float:
        """The mean loss a picture in this process since it was last asked for; waits for the device."""
        loss, count = self.newest.tolist()
        self.newest.zero_()
        return loss / count

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
