"""evaluation.py: counted against the definition, over pictures and over the tokens that have a label."""

import pytest
import torch
import torch.nn.functional as F

from refiner_min import evaluation, train
from refiner_min.augment import Batch, normalise
from refiner_min.evaluation import Score, evaluate
from refiner_min.model import RefinerConfig, RefinerOutput, RefinerViT
from refiner_min.splits import MemorySplit
from tests.runs import CPU, run_of


def test_evaluation_is_exact(pictures):
    run = run_of(pictures)
    with torch.no_grad():
        logits = run.best_model.eval()(normalise(run.subset.val.pictures))
    loss, right, count, among, tokens = run.evaluate()
    assert among is None and tokens is None
    assert (right, count) == ((logits.argmax(dim=1) == run.subset.val.labels).sum(), 12)
    assert loss == pytest.approx(F.cross_entropy(logits, run.subset.val.labels).item(), abs=1e-5)


@pytest.mark.parametrize("classes", [3, 5, 6, 20])
def test_top_five_where_there_are_more_than_five_classes(classes):
    torch.manual_seed(0)
    net = RefinerViT(RefinerConfig(img_size=16, patch_size=8, dim=24, depth=2, heads=3, num_classes=classes))
    pictures, labels = torch.randint(256, (50, 3, 16, 16), dtype=torch.uint8), torch.randint(classes, (50,))
    score = evaluate(net, MemorySplit(pictures, torch.ones(50), labels, cropped=True), CPU, 7)
    with torch.no_grad():
        order = net.eval()(normalise(pictures)).argsort(dim=1, descending=True)
    rank = (order == labels[:, None]).int().argmax(dim=1)
    assert (score.right, score.count) == ((rank == 0).sum(), 50)
    assert score.right_among_five == (None if classes <= 5 else (rank < 5).sum())


def test_a_score_is_said_as_the_published_code_says_it():
    assert str(Score(0.5, 82, 100, 98, None)) == "top-1 82.00 %, top-5 98.00 % (82 of 100), loss 0.5000"
    assert str(Score(0.5, 1, 3, None, 0.25)) == "top-1 33.33 % (1 of 3), of tokens 25.00 %, loss 0.5000"


def test_evaluation_is_without_tf32(monkeypatch):
    seen = []
    real = evaluation.count
    monkeypatch.setattr(evaluation, "count", lambda *words: seen.append((
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)) or real(*words))
    torch.set_float32_matmul_precision("high")
    try:
        net = RefinerViT(RefinerConfig(img_size=16, patch_size=8, dim=24, depth=2, heads=3, num_classes=3))
        split = MemorySplit(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.ones(2), torch.zeros(2).long())
        evaluate(net, split, CPU, 2)
        assert seen == [("highest", False)] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_what_is_reported_is_in_float32(pictures, monkeypatch):
    """The rest, the accuracy of the weights beside their average, is in the run's number format."""
    seen, real = [], evaluation.count
    monkeypatch.setattr(evaluation, "count", lambda *words: (
        seen.append(torch.is_autocast_enabled("cpu")), real(*words))[1])
    for ema in ("0", "0.9"):
        run = run_of(pictures, "--amp", "bf16", "--ema", ema)
        run.evaluate()
        run.evaluate(run.model)
    assert seen == [False, False, True, True] * 2  # two batches each


def test_tokens_are_counted_where_they_have_a_label():
    labels = F.one_hot(torch.tensor([[0, 1, 2, 0]]), 3).float() * torch.tensor([1.0, 1, 1, 0])[None, :, None]
    logits = 9 * F.one_hot(torch.tensor([[0, 1, 0, 0]]), 3).float()  # right, right, wrong, no label
    batch = Batch(None, None, torch.tensor([2]), token_labels=labels)
    found = evaluation.count(RefinerOutput(torch.tensor([[0.0, 0, 9]]), logits), batch)
    assert found[1:].tolist() == [1, 1, 1, 2, 3]


@pytest.mark.slow
def test_tokens_without_a_label_do_not_count():
    """A model that calls every token a 0 is right where a 0 is, and nowhere else."""
    arguments = ["--subset", "digit-scenes", "--ema", "0"]
    run = train.new_run(*train.parse(arguments), CPU)
    with torch.no_grad():
        run.model.token_head.bias[0] = 100
    tokens = next(run.subset.val.epoch(torch.arange(1000), 1000)).token_labels.sum(dim=(0, 1))  # of each digit
    assert run.evaluate().token_accuracy == pytest.approx((tokens[0] / tokens.sum()).item())
