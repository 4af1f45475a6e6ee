"""How well a model tells a split's pictures apart. It imports model, fold, augment, hardware and distributed."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from refiner_min import distributed, hardware
from refiner_min.augment import normalise
from refiner_min.fold import fold
from refiner_min.model import RefinerViT

TOP = 5


class Score(NamedTuple):
    loss: float  # the mean over the pictures
    right: int
    count: int
    right_among_five: int | None  # whose class is one of the five likeliest; None where there are no more than five
    token_accuracy: float | None  # over the patch tokens whose label is known; None where none is

    @property
    def accuracy(self) -> float:
        return self.right / self.count

    def __str__(self):  # as the published code prints it
        among = "" if self.right_among_five is None else f", top-5 {self.right_among_five / self.count:.2%}"
        tokens = "" if self.token_accuracy is None else f", of tokens {self.token_accuracy:.2%}"
        text = f"top-1 {self.accuracy:.2%}{among} ({self.right} of {self.count}){tokens}, loss {self.loss:.4f}"
        return text.replace("%", " %")


@torch.no_grad()
def evaluate(net: RefinerViT, split, device: torch.device, batch_size: int, amp: str = "off",
             folded: bool = True) -> Score:
    """Score of the model, which is on the device and is left in evaluation mode. split: its pictures as evaluation sees
    them (augment.evaluation_picture). batch_size: of one process. amp: the number format of the matrix products, as
    hardware.autocast's; "off" is float32, without TF32 on a GPU. folded: BatchNorms are folded into a copy, which is
    faster and rounds otherwise; a model with hooks wants to be run as it is."""
    net, split = net.eval(), split.to(device)
    distributed.take_from_first(net.buffers())  # BatchNorm's statistics, of several processes the first one's
    net = fold(net) if folded else net
    totals = torch.zeros(6, dtype=hardware.widest_float(device), device=device)
    indices = torch.arange(len(split))[distributed.rank()::distributed.world()]
    with hardware.exact_float32(), hardware.autocast(device, amp):
        for batch in split.epoch(indices, batch_size):
            output = net.forward_head(net.forward_features(normalise(batch.pictures)))
            totals += count(output, batch)
    loss, right, pictures, among, tokens_right, tokens = distributed.sum_over_processes(totals).tolist()
    few = net.config.num_classes <= TOP
    return Score(loss / pictures, int(right), int(pictures), None if few else int(among),
                 tokens_right / tokens if tokens else None)


def count(output, batch) -> torch.Tensor:
    """Of a batch (6,): sum of losses, right answers, pictures, right among five, right tokens, tokens with a label."""
    logits, tokens = output.combined(), torch.zeros(2, device=output.logits.device)
    likeliest = logits.topk(min(TOP, logits.shape[1]), dim=1).indices == batch.labels[:, None]  # (B, 5)
    if output.token_logits is not None and batch.token_labels is not None:
        right = output.token_logits.argmax(dim=2) == batch.token_labels.argmax(dim=2)  # (B, T)
        labelled = batch.token_labels.sum(dim=2) > 0
        tokens = torch.stack([(right & labelled).sum(), labelled.sum()])
    return torch.cat([torch.stack([
        F.cross_entropy(logits, batch.labels, reduction="sum"), likeliest[:, 0].sum(),
        torch.full_like(logits[0, 0], len(batch.labels)), likeliest.sum()]), tokens])
