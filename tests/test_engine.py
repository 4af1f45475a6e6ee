"""engine.py: every piece of a step against its definition, and what is learnt from."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tqdm import tqdm

from refiner_min import UserError, checkpoint, engine, evaluation, hardware, train
from refiner_min.model import RefinerOutput
from refiner_min.recipes import schedule
from refiner_min.records import StepLog
from refiner_min.relabel import Labels, box_share, pool_label_map
from refiner_min.step import parameter_groups
from refiner_min.stopping import SaveClock, StopRequest
from tests.pictures import random_labels
from tests.runs import CPU, NUMBERS, run_of, small


def test_flags_of_the_training_reach_it(pictures):
    run = run_of(pictures, "--crop-min", "0.5", "--crop-max", "0.9", "--flip", "0.1", "--turn", "5", "--colour", "0.2",
                 "--erasing", "0.3")
    assert (run.augment.area, run.augment.flip, run.augment.turn) == ((0.5, 0.9), 0.1, 5)
    assert (run.augment.colour, run.augment.size, run.recipe.erasing) == (0.2, 16, 0.3)
    assert run_of(pictures, "--ema", "0").ema is None and run_of(pictures, "--ema", "0.9").ema is not None
    assert run_of(pictures, "--weight-decay", "0.3").optimizer.param_groups[0]["weight_decay"] == 0.3
    assert run_of(pictures, "--lr", "0.3").optimizer.defaults["lr"] == 0.3
    for amp, enabled, dtype in (("off", False, None), ("bf16", True, torch.bfloat16), ("fp16", True, torch.float16)):
        run = run_of(pictures, "--amp", amp)
        with hardware.autocast(CPU, run.recipe.amp):
            assert torch.is_autocast_enabled("cpu") == enabled
            assert not enabled or torch.get_autocast_dtype("cpu") == dtype
    weights = [run_of(pictures, "--seed", seed).model.class_token for seed in ("1", "1", "2")]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_step_trains_on_what_was_mixed(pictures, monkeypatch):
    run, seen = run_of(pictures), []

    def keep(images, labels):
        seen.append((images, labels))
        run.step += 1

    monkeypatch.setattr(run, "train_step", keep)
    run.mix = lambda images, labels: (images * 0 + 7, Labels(F.one_hot(labels.image, 3) / 2))
    with StopRequest() as stop:
        run.train_epoch(stop, tqdm(disable=True), SaveClock(20), StepLog(run))
    assert len(seen) == 2
    for images, labels in seen:
        assert images.shape == (10, 3, 16, 16) and (images == 7).all()
        assert labels.image.shape == (10, 3) and (labels.image.sum(dim=1) == 0.5).all()


def test_train_step_follows_its_definition(pictures):
    """One step of AdamW on smoothed cross-entropy, and the average of the weights after each, by hand."""
    run = run_of(pictures, "--amp", "off", "--ema", "0.6", "--smoothing", "0.2", "--lr", "0.001")
    twin = run_of(pictures, "--amp", "off", "--ema", "0.6").model.train()
    optimizer = torch.optim.AdamW(parameter_groups(twin, run.recipe.weight_decay), lr=0.001)
    average = {name: value.clone() for name, value in twin.state_dict().items()}
    images, labels = torch.randn(10, 3, 16, 16), torch.arange(10) % 3
    target = 0.8 * F.one_hot(labels, 3) + 0.2 / 3
    run.wrapped.train()
    for step in range(3):
        run.train_step(images, Labels(labels))
        for group in optimizer.param_groups:
            group["lr"] = 0.001 * schedule(run.recipe, run.steps_per_epoch)(step)
        loss = -(target * twin(images).log_softmax(dim=1)).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in twin.state_dict().items():
            if value.is_floating_point():
                average[name] = decay * average[name] + (1 - decay) * value
        torch.testing.assert_close(run.loss.shown, loss.item(), atol=1e-5, rtol=1e-5)
    for name, value in twin.state_dict().items():
        if name.endswith(("qkv.bias", "reduce.1.bias")):
            continue  # a softmax does not see the keys' bias, nor a BatchNorm one before it: noise, enlarged by Adam
        torch.testing.assert_close(run.model.state_dict()[name], value, atol=1e-4, rtol=1e-4)
        if value.is_floating_point():
            torch.testing.assert_close(run.ema.state_dict()[name], average[name], atol=1e-4, rtol=1e-4)
    assert run.loss.total[1] == 30 and run.step == 3
    assert run.best_model is run.ema


def test_every_picture_is_seen_once_an_epoch_in_another_order(pictures):
    run = run_of(pictures, "--batch-size", "8")
    first, second = run.order(0), run.order(1)
    assert sorted(first.tolist()) == list(range(24)) and not torch.equal(first, second)
    assert torch.equal(first, run.order(0))
    assert not torch.equal(first, run_of(pictures, "--batch-size", "8", "--seed", "1").order(0))
    assert len(run_of(pictures, "--batch-size", "10").order(0)) == 20


def test_processes_share_a_batch(pictures):
    run = run_of(pictures, "--batch-size", "8")
    whole = run.order(0).split(8)
    run.world = 2
    shares = []
    for run.rank in range(2):
        shares.append(run.order(0).split(4))
    for batch, one, two in zip(whole, *shares):
        assert sorted(batch.tolist()) == sorted(one.tolist() + two.tolist())


def test_one_process_takes_the_shares_of_several(pictures):
    """Of the same pictures, in each step one share after the other, each with the chance of its process."""
    run = run_of(pictures, "--batch-size", "8")
    run.world, run.local_batch = 4, 2
    shares = []
    for run.rank in range(4):
        shares.append(run.order(0).split(2))
    alone = run_of(pictures, "--batch-size", "8", "--accumulate", "4")
    assert alone.local_batch == 2
    for step, here in enumerate(alone.order(0).split(8)):
        assert here.tolist() == torch.cat([share[step] for share in shares]).tolist()
    two = run_of(pictures, "--batch-size", "8", "--accumulate", "2")
    two.world, two.local_batch = 2, 2
    for two.rank in range(2):
        for step, here in enumerate(two.order(0).split(4)):
            assert here.tolist() == torch.cat([shares[2 * two.rank + part][step] for part in range(2)]).tolist()


def test_the_chance_of_a_part_is_that_of_its_process(pictures, monkeypatch):
    drawn = {}
    for name, parts, world in (("one", 6, 1), ("two", 3, 2)):
        run = run_of(pictures, "--batch-size", "12", "--accumulate", str(parts))
        for run.rank in range(world):
            run.world, run.step, run.part = world, 1, 0
            for run.part in range(parts):
                monkeypatch.setattr(run, "train_step", lambda *words, name=name, run=run: drawn.setdefault(
                    name, []).append(torch.initial_seed()))
                run.train_batch(next(run.subset.train.epoch(torch.arange(2), 2)))
    assert drawn["one"] == drawn["two"] and len(set(drawn["one"])) == 6


def test_accumulated_parts_make_one_step(pictures, monkeypatch):
    """Of 24 pictures in 3 parts of 8: the weights, their average and the schedule, to 1e-9 in float64."""
    monkeypatch.setattr(torch.nn.BatchNorm2d, "train", lambda self, mode=True: torch.nn.Module.train(self, False))
    torch.set_default_dtype(torch.float64)
    try:
        runs = [run_of(pictures, "--batch-size", "24", "--amp", "off", "--ema", "0.9", *flags)
                for flags in ((), ("--accumulate", "3"))]
    finally:
        torch.set_default_dtype(torch.float32)
    for run in runs:
        run.wrapped.train()
    for step in range(10):
        torch.manual_seed(step)
        images, labels = torch.randn(24, 3, 16, 16, dtype=torch.float64), torch.arange(24) % 3
        for run, parts in zip(runs, (1, 3)):
            for part, (some, theirs) in enumerate(zip(images.chunk(parts), labels.chunk(parts))):
                assert run.part == part and run.step == step
                run.train_step(some, Labels(theirs))
    whole, parted = runs
    assert whole.step == parted.step == whole.scheduler.last_epoch == parted.scheduler.last_epoch == 10
    assert whole.loss.mean() == pytest.approx(parted.loss.mean(), abs=1e-12) and parted.loss.total[1] == 240
    for one, two in zip(whole.averaged[0] + whole.averaged[1], parted.averaged[0] + parted.averaged[1]):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=0)


def test_batchnorm_counts_once_a_step(pictures):
    """Its statistics are those of the first process's share, as they are of several processes."""
    run, twin = (run_of(pictures, "--batch-size", "24", "--amp", "off", *flags)
                 for flags in (("--accumulate", "3"), ()))
    run.wrapped.train()
    twin.wrapped.train()
    images, labels = torch.randn(24, 3, 16, 16), torch.arange(24) % 3
    for some, theirs in zip(images.chunk(3), labels.chunk(3)):
        run.train_step(some, Labels(theirs))
    twin.model(images[:8])
    for one, two in zip(run.model.buffers(), twin.model.buffers()):
        torch.testing.assert_close(one, two)


def test_erasing_comes_after_mixing(pictures, monkeypatch):
    """As published: noise is never mixed into the partner."""
    run, seen = run_of(pictures, "--erasing", "1"), []
    run.mix = lambda images, labels: (images * 0 + 7, labels)
    monkeypatch.setattr(run, "train_step", lambda images, labels: seen.append(images) or setattr(run, "step", 2))
    with StopRequest() as stop:
        run.train_epoch(stop, tqdm(disable=True), SaveClock(20), StepLog(run))
    for images in seen:
        erased = (images != 7).any(dim=1).flatten(1).float().mean(dim=1)  # the share of each picture
        assert 0.01 < erased.min() and erased.max() < 0.6


@pytest.mark.parametrize("finite", [True, False])
def test_a_step_that_the_scaler_leaves_out_moves_neither_average_nor_schedule(pictures, finite, monkeypatch):
    run = run_of(pictures, "--amp", "fp16", "--ema", "0.9")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    real, before = run.criterion, run.ema.state_dict()["class_token"].clone()
    run.criterion = lambda *words: real(*words) * (1.0 if finite else math.inf)
    monkeypatch.setattr(run.loss, "add", lambda *words: None)
    weights = run.model.class_token.detach().clone()
    run.wrapped.train()
    run.train_step(torch.randn(10, 3, 16, 16), Labels(torch.arange(10) % 3))
    assert torch.equal(run.model.class_token, weights) != finite
    assert torch.equal(run.ema.state_dict()["class_token"], before) != finite
    assert run.scheduler.last_epoch == int(finite) and run.step == 1


def test_gradients_are_clipped(pictures):
    norms = {}
    for clip in ("0", "0.01"):
        run = run_of(pictures, "--amp", "off", "--clip-grad", clip)
        run.wrapped.train()
        run.train_step(torch.randn(10, 3, 16, 16), Labels(torch.arange(10) % 3))
        gradients = [parameter.grad for parameter in run.model.parameters() if parameter.grad is not None]
        norms[clip] = torch.nn.utils.get_total_norm(gradients).item()
    assert norms["0.01"] == pytest.approx(0.01, rel=1e-3) and norms["0"] > 0.1


def test_gradients_are_clipped_without_fp16s_scale(pictures, monkeypatch):
    norms, clip = {}, engine.nn.utils.clip_grad_norm_
    for amp in ("off", "fp16"):
        run = run_of(pictures, "--amp", amp, "--clip-grad", "1")
        if amp == "fp16":
            run.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        monkeypatch.setattr(engine.nn.utils, "clip_grad_norm_",
                            lambda *words, amp=amp: norms.update({amp: float(clip(*words))}))
        run.wrapped.train()
        torch.manual_seed(0)
        run.train_step(torch.randn(10, 3, 16, 16), Labels(torch.arange(10) % 3))
    assert norms["fp16"] == pytest.approx(norms["off"], rel=0.2)


def test_a_validation_loss_that_is_not_finite_is_called_that(pictures, monkeypatch):
    score = evaluation.Score(math.nan, 1, 12, None, None)
    monkeypatch.setattr(engine, "evaluate", lambda *words: score)
    with pytest.raises(UserError, match="the validation loss was not finite after epoch 1; .* last good checkpoint"):
        train.main(small(pictures, "--out", "a"))
    assert checkpoint.load("a/last.pt")["step"] == 0


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(pictures, monkeypatch):
    real = F.cross_entropy

    def explode(logits, labels, **options):
        loss = real(logits, labels, **options)
        return loss * math.nan if "label_smoothing" in options and explode.step == 3 else count(loss, options)

    def count(loss, options):
        explode.step += "label_smoothing" in options
        return loss

    explode.step = 0
    monkeypatch.setattr(F, "cross_entropy", explode)
    with pytest.raises(UserError, match="the loss was not finite at step 3"):
        train.main(small(pictures, "--out", "a"))
    state = checkpoint.load("a/last.pt")
    assert state["step"] == 2 and all(value.isfinite().all() for value in state["model"].values())


# ----------------------------------------------------------------------------------------------------------------------
# Token labels


def test_a_step_learns_from_the_pooled_labels(pictures, labels, monkeypatch):
    """What train_step is given: the labels of the maps under the boxes of the augmentation, in the order of the
    pictures."""
    run, seen = run_of(pictures, "--relabel", labels, "--flip", "0"), []
    logits, ids = (torch.from_numpy(planes) for planes in random_labels(24))
    change = run.augment

    def keep_boxes(batch):
        seen.append(change(batch))
        return seen[-1]

    def keep(images, given):
        batch = seen[-1]
        rows = run.order(0).split(10)[len(seen) - 1]
        expected = pool_label_map(logits[rows].float(), ids[rows], batch.boxes, 3, 2)
        torch.testing.assert_close(given.image, expected[0])
        torch.testing.assert_close(given.tokens, expected[1])
        assert torch.equal(images, batch.pictures)
        run.step += 1

    monkeypatch.setattr(run, "augment", keep_boxes)
    monkeypatch.setattr(run, "train_step", keep)
    with StopRequest() as stop:
        run.train_epoch(stop, tqdm(disable=True), SaveClock(20), StepLog(run))
    assert len(seen) == 2


@pytest.mark.parametrize("flags, image, tokens", [
    ((), (10, 3), (10, 4, 3)),
    (("--no-token-labels",), (10, 3), None),
    (("--dense-weight", "0"), (10, 3), None),
])
def test_which_labels_are_learnt_from(pictures, labels, flags, image, tokens):
    run = run_of(pictures, "--relabel", labels, *flags)
    found = run.labels(run.augment(next(run.subset.train.epoch(torch.arange(10), 10))))
    assert found.image.shape == image and (found.tokens.shape if tokens else found.tokens) == tokens


def test_mix_token_mixes_what_the_loss_is_told(pictures, monkeypatch):
    flags = ["--mix-token", "--dense-weight", "0.5", "--amp", "off", "--patch-size", "4"]  # 4 x 4 tokens
    run, seen = run_of(pictures, *flags), []
    forward, criterion = run.model.forward, run.criterion

    def keep(images, mix_box=None):
        seen.append(mix_box)
        return forward(images, mix_box)

    def check(output, labels, share):
        assert share == box_share(seen[-1].tolist(), 4) and isinstance(output, RefinerOutput)
        return criterion(output, labels, share)

    monkeypatch.setattr(run.model, "forward", keep)
    run.criterion = check
    run.model.train()
    for _ in range(6):
        torch.manual_seed(run.step)
        run.train_step(torch.randn(10, 3, 16, 16), Labels(torch.arange(10) % 3))
    assert len({box_share(box.tolist(), 4) for box in seen}) > 1
    run.recipe = replace(run.recipe, mix_token=False)
    monkeypatch.setattr(run.model, "forward", lambda images, mix_box=None: seen.append(mix_box) or forward(images))
    run.criterion = lambda output, labels, share: criterion(output, labels, seen.append(share) or share)
    run.train_step(torch.randn(10, 3, 16, 16), Labels(torch.arange(10) % 3))
    assert seen[-2:] == [None, 0.0]


@pytest.mark.parametrize("flags, tokens", [
    ([], True), (["--no-token-labels"], False), (["--dense-weight", "0"], False)])
def test_digit_scenes_with_and_without_their_token_labels(flags, tokens):
    arguments = ["--subset", "digit-scenes", "--out", f"out{next(NUMBERS)}", *flags]
    run = train.new_run(*train.parse(arguments), CPU)
    found = run.labels(run.augment(next(run.subset.train.epoch(torch.arange(4), 4))))
    assert found.image.shape == (4,) and (found.tokens is not None) == tokens
    assert run.model.config.dense == ("0" not in flags)


def test_moments_are_laid_out_as_their_parameters_are(pictures):
    """A GPU's convolutions have their channels last in memory, and the fused step goes through memory in order."""
    run, twin = run_of(pictures), run_of(pictures)
    batch = next(run.subset.train.epoch(run.order(0), run.local_batch))
    run.train_batch(batch)
    state = deepcopy(run.state())
    for moments in state["optimizer"]["state"].values():
        for name, value in moments.items():
            if value.ndim == 4:
                moments[name] = value.contiguous(memory_format=torch.channels_last)
    twin.restore(state)
    for one in (run, twin):
        one.train_batch(batch)
    assert run.optimizer.param_groups[0]["lr"] == twin.optimizer.param_groups[0]["lr"]
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, twin.model.state_dict()[name]), name
