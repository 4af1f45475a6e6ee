"""train.py: every piece of a step against its definition, every flag, every refusal, and runs that go on as if they
had never stopped."""

import csv
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tqdm import tqdm

from refiner_min import UserError, checkpoint, data, hardware, run_command, train
from refiner_min.model import RefinerOutput, refiner_vit_s
from refiner_min.relabel import Labels, box_share, pool_label_map
from tests.pictures import make_folder, names_of, pack_labels, random_labels
from tests.test_checkpoint import published_state

CPU = torch.device("cpu")
SMALL = ["--img-size", "16", "--epochs", "2", "--batch-size", "10", "--warmup-epochs", "1", "--device", "cpu"]
NUMBERS = itertools.count()
TIMES = ("seconds", "images_per_second")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures") / "set", train=8, val=4)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()  # what other tests compiled does not count towards the limit of recompilations


def small(pictures, *flags) -> list[str]:
    return ["--subset", "folder", "--data", str(pictures), *SMALL, *flags]


def run_of(pictures, *flags) -> train.Run:
    arguments = small(pictures, "--out", f"out{next(NUMBERS)}", *flags)
    return train.new_run(*train.parse(arguments), CPU, arguments)


def rows_of(out) -> list[dict]:
    with open(Path(out) / "metrics.csv") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def assert_same_runs(one, two):
    """Metrics but for times, and every tensor of the checkpoint."""
    assert rows_of(one) == rows_of(two)
    first, second = (checkpoint.load(Path(out) / "last.pt") for out in (one, two))
    for part in ("model", "ema"):
        assert (first[part] is None) == (second[part] is None)
        for name, value in (first[part] or {}).items():
            assert torch.equal(value, second[part][name]), name


# ----------------------------------------------------------------------------------------------------------------------
# Recipes and flags


def test_every_preset_names_its_command_and_every_subset_has_two():
    assert train.PRESETS.keys() == set(data.SUBSETS)
    for gpu, cpu in train.PRESETS.values():
        for preset in (gpu, cpu):
            assert "-m refiner_min.train" in preset.__doc__
            if preset().model == "ti":
                train.build_model(preset(), data.Subset("x", None, None, None, ["a", "b"]))


def test_the_imagenet_preset_is_the_published_recipe():
    short = train.choose_recipe("imagenet", CPU, {"epochs": 31})
    assert (short.warmup_epochs, short.cooldown_epochs) == (0.5, 1)  # a tenth of the run, a tenth of each
    recipe = train.choose_recipe("imagenet", CPU, {"batch_size": 1024, "amp": "off"})
    assert recipe.lr == pytest.approx(2e-3)  # 5e-4 at 256, scaled
    published = dict(weight_decay=0.05, min_lr=1e-5, warmup_epochs=5, epochs=310, cooldown_epochs=10, mixup=0.8,
                     cutmix=1, smoothing=0.1, erasing=0.25, flip=0.5, crop_min=0.08, crop_max=1, randaugment=9,
                     ema=0.99996, drop_path=0.1, model="s", img_size=224, patch_size=16, eval_crop=0.9)
    assert {name: getattr(recipe, name) for name in published} == published


def test_a_given_learning_rate_is_not_scaled():
    assert train.choose_recipe("digits", CPU, {"batch_size": 96}).lr == pytest.approx(2 * train.Digits().lr)
    assert train.choose_recipe("digits", CPU, {"batch_size": 96, "lr": 0.5}).lr == 0.5


OTHER = {  # another value than any preset's, for every field of a recipe
    "model": "s", "img_size": 24, "patch_size": 4, "refine": False, "share": False, "expand": 2, "kernel_size": 5,
    "linear": True, "drop_path": 0.07, "epochs": 3, "batch_size": 7, "lr": 0.007, "min_lr": 0.0007,
    "warmup_epochs": 0.7, "cooldown_epochs": 1, "weight_decay": 0.07, "ema": 0.7, "smoothing": 0.07,
    "dense_weight": 0.7, "token_labels": False, "mix_token": True, "mixup": 0.7, "cutmix": 0.7,
    "crop_min": 0.57, "crop_max": 1.7, "flip": 0.7, "turn": 7.0, "colour": 0.7, "randaugment": 7, "erasing": 0.7,
    "eval_crop": 0.7, "seed": 7, "amp": "off",
}


@pytest.mark.parametrize("name", [item.name for item in fields(train.Recipe)])
def test_every_field_is_a_flag(name):
    flag, value = f"--{name.replace('_', '-')}", OTHER[name]
    words = [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [flag, str(value)]
    _, given = train.parse(words)
    assert given == {name: value}
    assert train.parse([])[1] == {}
    recipe = train.choose_recipe("imagenette", CPU, given)
    assert getattr(recipe, name) == value
    if name == "linear":
        assert recipe.share is False


@pytest.mark.parametrize("flags, config", [
    (["--no-refine"], dict(refine=False)), (["--no-share"], dict(share=False)), (["--expand", "2"], dict(expand=2)),
    (["--kernel-size", "5"], dict(kernel_size=5)), (["--linear"], dict(linear=True, share=False)),
    (["--drop-path", "0.2"], dict(drop_path=0.2)), (["--img-size", "24"], dict(img_size=24)),
    (["--patch-size", "4"], dict(patch_size=4)), (["--model", "s"], dict(dim=384, depth=16)),
])
def test_flags_of_the_model_reach_it(pictures, flags, config):
    found = asdict(run_of(pictures, *flags).model.config)
    assert {name: found[name] for name in config} == config
    assert found["num_classes"] == 3 and not found["dense"]


def test_flags_of_the_training_reach_it(pictures):
    run = run_of(pictures, "--crop-min", "0.5", "--crop-max", "0.9", "--flip", "0.1", "--turn", "5", "--colour", "0.2",
                 "--erasing", "0.3")
    augment = run.augment
    assert (augment.area, augment.flip, augment.turn) == ((0.5, 0.9), 0.1, 5)
    assert (augment.colour, augment.erasing, augment.size) == (0.2, 0.3, 16)
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


def test_flags_of_a_stream_reach_it(pictures, monkeypatch):
    monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    run = run_of(pictures, "--workers", "1", "--randaugment", "3", "--flip", "0.2", "--skip-bad", "--crop-min", "0.4")
    split = run.subset.train
    assert (split.workers, split.skip_bad, split.seed) == (1, True, 0)
    choice, flip, augment, _ = split.transform.alone.transforms
    assert (augment.magnitude, flip.p, choice.transforms[0].scale) == (3, 0.2, (0.4, 1.0))
    assert run.augment.area is None
    loss, right, count, _ = run.evaluate()
    assert 0 < loss < 10 and 0 <= right <= count == 12


@pytest.mark.parametrize("flags, message", [
    (["--epochs", "0"], "--epochs 0 must be at least 1"), (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
    (["--lr", "0"], "--lr 0.0 must be at least"),
    (["--smoothing", "2"], "--smoothing 2.0 must be at least 0 and at most 1"),
    (["--warmup-epochs", "3"], "--warmup-epochs 3 and --cooldown-epochs 0 must fit into --epochs 2"),
    (["--crop-min", "0.9", "--crop-max", "0.5"], "--crop-min 0.9 must not be above --crop-max 0.5"),
    (["--workers", "-1"], "--workers -1 must be at least 0"),
    (["--resume", "a", "--weights", "b.pt"], "leave out --weights"), (["--resume", "a", "--out", "b"], "and --out"),
    (["--batch-size", "1000"], "--batch-size 1000 is larger than the 24 training pictures"),
    (["--img-size", "17"], "patch_size=8 must divide img_size=17"),
    (["--linear", "--share"], "share=True must be False with linear=True"),
    (["--device", "nonsense"], "--device nonsense cannot be used here"),
    (["--weights", "none.pt"], "there is no checkpoint none.pt"), (["--resume"], "there is no checkpoint .*last.pt"),
    (["--eval"], "there is no checkpoint .*best.pt"),
])
def test_flags_that_do_not_go(pictures, flags, message):
    with pytest.raises(UserError, match=message):
        train.main(small(pictures, *flags))
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(pictures):
    with pytest.raises(UserError, match="--device cuda cannot be used here"):
        train.main(small(pictures, "--device", "cuda"))


# ----------------------------------------------------------------------------------------------------------------------
# The pieces of a step


def test_schedule():
    recipe = train.Recipe(lr=1e-2, min_lr=1e-4, epochs=10, cooldown_epochs=2, warmup_epochs=2)
    share = train.schedule(recipe, steps_per_epoch=5)
    values = [share(step) for step in range(50)]
    assert values[0] == pytest.approx(1 / 11)  # not at full rate
    assert all(b - a == pytest.approx(1 / 11) for a, b in zip(values[:9], values[1:10]))
    assert values[10] == 1.0 and max(values) == 1.0
    assert values[25] == pytest.approx(0.01 + 0.99 / 2)  # the middle of the cosine
    assert all(a > b for a, b in zip(values[10:40], values[11:41]))
    assert values[40:] == [pytest.approx(0.01)] * 10


def test_decay_is_on_matrices_and_kernels_only(pictures):
    run = run_of(pictures)
    decay, rest = train.parameter_groups(run.model, 0.3)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    chosen = {id(parameter) for parameter in decay["params"]}
    for name, parameter in run.model.named_parameters():
        is_kernel = name.endswith("weight") and parameter.ndim > 1
        assert (id(parameter) in chosen) == is_kernel, name
    assert len(decay["params"]) + len(rest["params"]) == len(list(run.model.parameters()))


@pytest.mark.parametrize("flags", [dict(mixup=0.8), dict(cutmix=1.0), dict(mixup=0.8, cutmix=1.0)], ids=str)
def test_labels_are_mixed_as_the_pictures_are(flags):
    """Every picture shows the number of its class, so the mean of a mixed picture is what its label must be."""
    torch.manual_seed(0)
    mix = train.make_mixing(train.Recipe(**flags), num_classes=8)
    labels = torch.arange(8)
    shares = set()
    for _ in range(20):
        images = labels.float()[:, None, None, None].expand(8, 3, 16, 16).clone()
        mixed, (soft, _) = mix(images, Labels(labels))
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(8))
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), soft @ labels.float(), atol=1e-4, rtol=1e-4)
        shares.add(round(soft.max(dim=1).values[0].item(), 4))
    assert len(shares) > 5
    images, same = train.make_mixing(train.Recipe(), 8)(images, Labels(labels))
    assert same.image is labels


def test_a_step_trains_on_what_was_mixed(pictures, monkeypatch):
    run, seen = run_of(pictures), []

    def keep(images, labels):
        seen.append((images, labels))
        run.step += 1

    monkeypatch.setattr(run, "train_step", keep)
    run.mix = lambda images, labels: (images * 0 + 7, Labels(F.one_hot(labels.image, 3) / 2))
    with train.StopRequest() as stop:
        run.train_epoch(stop, tqdm(disable=True))
    assert len(seen) == 2
    for images, labels in seen:
        assert images.shape == (10, 3, 16, 16) and (images == 7).all()
        assert labels.image.shape == (10, 3) and (labels.image.sum(dim=1) == 0.5).all()


def test_train_step_follows_its_definition(pictures):
    """One step of AdamW on smoothed cross-entropy, and the average of the weights after each, by hand."""
    run = run_of(pictures, "--amp", "off", "--ema", "0.6", "--smoothing", "0.2", "--lr", "0.001")
    twin = run_of(pictures, "--amp", "off", "--ema", "0.6").model.train()
    optimizer = torch.optim.AdamW(train.parameter_groups(twin, run.recipe.weight_decay), lr=0.001)
    average = {name: value.clone() for name, value in twin.state_dict().items()}
    images, labels = torch.randn(10, 3, 16, 16), torch.arange(10) % 3
    target = 0.8 * F.one_hot(labels, 3) + 0.2 / 3
    run.wrapped.train()
    for step in range(3):
        run.train_step(images, Labels(labels))
        for group in optimizer.param_groups:
            group["lr"] = 0.001 * train.schedule(run.recipe, run.steps_per_epoch)(step)
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


def test_the_mean_loss_is_a_mean_over_pictures():
    watch = train.LossWatch(CPU)
    watch.add(torch.tensor(1.0), 10, 0)
    watch.add(torch.tensor(4.0), 5, 1)
    assert watch.mean() == pytest.approx(2.0) and watch.shown == 4.0
    with pytest.raises(UserError, match="not finite at step 7"):
        watch.add(torch.tensor(math.inf), 5, 7)
    with pytest.raises(UserError, match="not finite at step 7"):
        watch.mean()


def test_evaluation_is_exact(pictures):
    run = run_of(pictures)
    with torch.no_grad():
        images = data.center_crop(run.subset.val.pictures, run.subset.val.aspects, 16)
        logits = run.best_model.eval()(images)
    loss, right, count, tokens = run.evaluate()
    assert tokens is None and (right, count) == ((logits.argmax(dim=1) == run.subset.val.labels).sum(), 12)
    assert loss == pytest.approx(F.cross_entropy(logits, run.subset.val.labels).item(), abs=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Token labels


@pytest.fixture(scope="module")
def labels(pictures, tmp_path_factory):
    return str(pack_labels(tmp_path_factory.mktemp("labels") / "store", names_of(pictures), *random_labels(24)))


def test_relabel_teaches_a_token_head(pictures, labels):
    run = run_of(pictures, "--relabel", labels)
    assert run.recipe.dense_weight == 0.5 and run.model.config.dense
    assert run.origin()["annotator"] == "hand at 64 px" and run.origin()["relabel"] == labels
    assert run_of(pictures, "--relabel", labels, "--dense-weight", "0.2").criterion.dense_weight == 0.2
    alone = run_of(pictures, "--relabel", labels, "--dense-weight", "0")  # ReLabel: the class token's label only
    assert not alone.model.config.dense
    assert not run_of(pictures).model.config.dense
    assert run_of(pictures, "--dense-weight", "0.3").model.config.dense


def test_a_step_learns_from_the_pooled_labels(pictures, labels, monkeypatch):
    """What train_step is given: the labels of the maps under the boxes of the augmentation, in the order of the
    pictures."""
    run, seen = run_of(pictures, "--relabel", labels, "--flip", "0"), []
    logits, ids = (torch.from_numpy(planes) for planes in random_labels(24))
    augment = run.augment

    def keep_boxes(batch):
        seen.append(augment(batch))
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
    with train.StopRequest() as stop:
        run.train_epoch(stop, tqdm(disable=True))
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
    run, seen = run_of(pictures, "--mix-token", "--dense-weight", "0.5", "--amp", "off"), []
    forward, criterion = run.model.forward, run.criterion

    def keep(images, mix_box=None):
        seen.append(mix_box)
        return forward(images, mix_box)

    def check(output, labels, share):
        assert share == box_share(seen[-1], 2) and isinstance(output, RefinerOutput)
        return criterion(output, labels, share)

    monkeypatch.setattr(run.model, "forward", keep)
    run.criterion = check
    run.model.train()
    for _ in range(6):
        torch.manual_seed(run.step)
        run.train_step(torch.randn(10, 3, 16, 16), Labels(torch.arange(10) % 3))
    assert len(set(seen)) > 1
    run.recipe = replace(run.recipe, mix_token=False)
    monkeypatch.setattr(run.model, "forward", lambda images, mix_box=None: seen.append(mix_box) or forward(images))
    run.criterion = lambda output, labels, share: criterion(output, labels, seen.append(share) or share)
    run.train_step(torch.randn(10, 3, 16, 16), Labels(torch.arange(10) % 3))
    assert seen[-2:] == [None, 0.0]


@pytest.mark.parametrize("flags", [
    ["--mix-token"], ["--mixup", "0.8", "--cutmix", "1.0", "--mix-token"], ["--turn", "20", "--crop-max", "1.3"],
    ["--dense-weight", "0", "--mix-token"], ["--no-token-labels"], ["--compile", "--mix-token", "--cutmix", "1"],
])
def test_every_way_of_learning_from_maps_trains(pictures, labels, flags, monkeypatch):
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compile_model(net, backend="aot_eager"))
    assert train.main(small(pictures, "--relabel", labels, "--out", "run", *flags)) == 0
    assert len(rows_of("run")) == 2 and "val_token_accuracy" not in rows_of("run")[0]
    assert train.main(["--eval", "--out", "run", "--subset", "folder", "--data", str(pictures)]) == 0


def test_a_stream_with_maps_trains_as_a_decoded_set_does(pictures, labels, monkeypatch):
    monkeypatch.setattr(data, "MEMORY_LIMIT", 1000)
    for workers in ("0", "2"):
        flags = ["--relabel", labels, "--randaugment", "9", "--mix-token", "--cutmix", "1", "--workers", workers]
        assert train.main(small(pictures, "--out", f"run{workers}", *flags)) == 0
    assert_same_runs("run0", "run2")


def test_stopped_and_resumed_with_maps_is_as_never_stopped(pictures, labels, monkeypatch):
    flags = ["--relabel", labels, "--mix-token", "--mixup", "0.8", "--cutmix", "1", "--ema", "0.9"]
    assert train.main(small(pictures, "--out", "whole", *flags)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train.StopRequest, "agreed", lambda self, step: setattr(self, "signal", 15) or step == 3)
        assert train.main(small(pictures, "--out", "stopped", *flags)) == 128 + 15
    assert train.main(["--resume", "stopped", "--device", "cpu"]) == 0  # which knows its maps
    assert_same_runs("whole", "stopped")
    other = pack_labels(Path("other"), names_of(pictures), *random_labels(24), annotator="another")
    with pytest.raises(UserError, match="annotator .hand at 64 px there, another at 64 px here."):
        train.main(["--resume", "stopped", "--device", "cpu", "--relabel", str(other)])


def test_maps_do_not_go_with_an_evaluation(pictures, labels):
    with pytest.raises(UserError, match="--relabel does not go with --eval"):
        train.main([*small(pictures), "--eval", "--relabel", labels])


def test_pictures_without_maps_stop_a_run_before_it_starts(pictures):
    store = pack_labels(Path("store"), names_of(pictures)[1:], *random_labels(23))
    with pytest.raises(UserError, match="store has no map for 1 of the 24 training pictures"):
        train.main(small(pictures, "--relabel", str(store), "--out", "run"))
    assert not Path("run").exists()


def test_digit_scenes(capsys):
    """A little of the preset, and its tokens' accuracy: as counted here, and as --eval says."""
    flags = ["--subset", "digit-scenes", "--device", "cpu", "--epochs", "1", "--lr", "1e-9"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.SceneSplit, "__len__", lambda self: 128)
        assert train.main(flags) == 0
    row = rows_of("runs/digit-scenes")[0]
    assert json.loads(Path("runs/digit-scenes/config.json").read_text())["result"]["token_accuracy"] == float(
        row["val_token_accuracy"])
    assert "of tokens" in capsys.readouterr().out
    assert train.main(["--eval", "--subset", "digit-scenes", "--device", "cpu"]) == 0
    net, state = checkpoint.load_model("runs/digit-scenes/best.pt")
    batch = next(data.load_subset("digit-scenes", None, 32).val.epoch(torch.arange(1000), 1000))
    with torch.no_grad():
        output = net.forward_head(net.forward_features(data.normalise(batch.pictures)))
    labelled = batch.token_labels.sum(dim=2) > 0
    right = (output.token_logits.argmax(dim=2) == batch.token_labels.argmax(dim=2))[labelled].float().mean().item()
    said = re.search(r"of tokens ([\d.]+)%", capsys.readouterr().out.splitlines()[-1])
    assert float(said.group(1)) / 100 == pytest.approx(right, abs=2e-4)


def test_tokens_without_a_label_do_not_count():
    """A model that calls every token a 0 is right where a 0 is, and nowhere else."""
    arguments = ["--subset", "digit-scenes", "--ema", "0"]
    run = train.new_run(*train.parse(arguments), CPU, arguments)
    with torch.no_grad():
        run.model.token_head.bias[0] = 100
    tokens = next(run.subset.val.epoch(torch.arange(1000), 1000)).token_labels.sum(dim=(0, 1))  # of each digit
    assert run.evaluate().token_accuracy == pytest.approx((tokens[0] / tokens.sum()).item())


@pytest.mark.parametrize("flags, tokens", [
    ([], True), (["--no-token-labels"], False), (["--dense-weight", "0"], False)])
def test_digit_scenes_with_and_without_their_token_labels(flags, tokens):
    arguments = ["--subset", "digit-scenes", "--out", f"out{next(NUMBERS)}", *flags]
    run = train.new_run(*train.parse(arguments), CPU, arguments)
    found = run.labels(run.augment(next(run.subset.train.epoch(torch.arange(4), 4))))
    assert found.image.shape == (4,) and (found.tokens is not None) == tokens
    assert run.model.config.dense == ("0" not in flags)


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


def test_the_default_run_on_the_digits_in_little(capsys):
    flags = ["--img-size", "16", "--epochs", "3", "--batch-size", "100", "--device", "cpu"]
    assert train.main(flags) == 0
    said = capsys.readouterr().out
    out = Path("runs/digits")
    assert sorted(file.name for file in out.iterdir()) == [
        "best.pt", "config.json", "curves.png", "last.backup.pt", "last.pt", "metrics.csv"]
    rows = rows_of(out)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and rows[-1]["step"] == "42"
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    record = json.loads((out / "config.json").read_text())
    assert record["recipe"]["batch_size"] == 100 and record["classes"] == [str(digit) for digit in range(10)]
    assert record["versions"]["torch"] == torch.__version__ and record["pictures"] == {"train": 1442, "val": 355}
    assert record["result"]["accuracy"] == float(rows[-1]["val_accuracy"])
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert said.index("recipe: ") < said.index("epoch     step")  # what was chosen is printed first

    best = max(rows, key=lambda row: float(row["val_accuracy"]))
    right = round(float(best["val_accuracy"]) * 355)
    before = {file: file.read_bytes() for file in out.iterdir()}
    assert train.main(["--eval", "--device", "cpu"]) == 0  # best.pt of runs/digits
    assert f"({right} of 355)" in capsys.readouterr().out
    last = round(float(rows[-1]["val_accuracy"]) * 355)
    assert train.main(["--eval", "--device", "cpu", "--weights", str(out / "last.pt"), "--batch-size", "7"]) == 0
    assert f"({last} of 355)" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in out.iterdir()} == before  # looking changes nothing

    with pytest.raises(UserError, match=r"runs/digits holds a run already .*--resume runs/digits"):
        train.main(flags)
    assert train.main(["--resume", "--device", "cpu"]) == 0  # it is finished: nothing is trained
    assert rows_of(out) == rows


@pytest.mark.parametrize("subset", ["imagenette", "imagewoof", "folder"])
def test_photos(pictures, subset, capsys):
    assert train.main(["--subset", subset, "--data", str(pictures), *SMALL, "--mixup", "0.8", "--cutmix", "1"]) == 0
    said = capsys.readouterr().out
    assert f"{subset}: on" in said and "24 pictures to train on, 12 to validate, 3 classes" in said
    assert json.loads(Path(f"runs/{subset}/config.json").read_text())["classes"][0] == "tench"


def test_imagenet(tmp_path, capsys):
    wnids = (data.ASSETS / "imagenet_wnids.txt").read_text().split()
    root = make_folder(tmp_path / "imagenet", train=1, val=1, size=(8, 8), classes=wnids)
    flags = ["--subset", "imagenet", "--data", str(root), "--model", "ti", "--img-size", "16", "--patch-size", "8",
             "--epochs", "1", "--batch-size", "500", "--workers", "2", "--device", "cpu"]
    assert train.main(flags) == 0
    assert rows_of("runs/imagenet")[0]["step"] == "2"

    torch.manual_seed(0)
    released = {"state_dict": published_state(refiner_vit_s(img_size=32))}
    torch.save(released, "published.pth.tar")
    evaluate = ["--img-size", "32", "--eval", "--workers", "0", "--device", "cpu", "--weights", "published.pth.tar"]
    assert train.main(["--subset", "imagenet", "--data", str(root), *evaluate]) == 0
    assert "of 1000)" in capsys.readouterr().out
    few = make_folder(tmp_path / "few", train=1, val=1)
    with pytest.raises(UserError, match=r"head.weight: \(1000, 384\) in the file, \(3, 384\) in the model"):
        train.main(["--subset", "folder", "--data", str(few), "--model", "s", "--patch-size", "16", *evaluate])


@pytest.mark.parametrize("flags", [["--no-refine"], ["--linear"], ["--no-share"], ["--expand", "1"], ["--amp", "bf16"],
                                   ["--amp", "fp16"], ["--kernel-size", "1"], ["--ema", "0"]], ids=" ".join)
def test_every_form_trains(pictures, flags):
    assert train.main(small(pictures, *flags, "--epochs", "1")) == 0


def test_compile(pictures, monkeypatch):
    """--compile hands the network to torch.compile; a backend that needs no C++ compiler stands in for the default."""
    compiled = []

    def compile_eagerly(network, real=torch.compile):
        compiled.append(network)
        return real(network, backend="aot_eager", fullgraph=True)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", compile_eagerly)
        assert train.main(small(pictures, "--compile", "--amp", "off")) == 0
    assert len(compiled) == 1
    os.rename("runs", "compiled")
    assert train.main(small(pictures, "--amp", "off")) == 0
    one, two = (float(rows_of(out)[-1]["train_loss"]) for out in ("compiled/folder", "runs/folder"))
    assert one == pytest.approx(two, abs=1e-3)


def test_two_processes(pictures):
    flags = small(pictures, "--out", "two", "--batch-size", "12", "--epochs", "1")
    done = torchrun(*flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pictures to train on") == 1  # one process speaks for both
    assert json.loads(Path("two/config.json").read_text())["processes"] == 2
    row = rows_of("two")[0]
    run = run_of(pictures, "--batch-size", "12")
    run.restore(checkpoint.load("two/last.pt"))  # what was saved is what was evaluated, BatchNorm's statistics too
    loss, right, *_ = run.evaluate()
    assert right / 12 == float(row["val_accuracy"]) and loss == pytest.approx(float(row["val_loss"]), abs=1e-6)
    assert run.loss.total[1] == 0  # an epoch's sums begin anew

    done = torchrun(*small(pictures, "--out", "odd", "--batch-size", "11"))
    assert "--batch-size 11 must be a multiple of the 2 processes" in done.stderr and not Path("odd").exists()
    with pytest.raises(UserError, match=r"processes \(2 there, 1 here\)"):
        train.main(["--resume", "two", "--device", "cpu"])


def test_two_processes_learn_from_maps(pictures, labels):
    flags = ["--batch-size", "12", "--epochs", "1", "--mix-token", "--mixup", "0.8", "--cutmix", "1"]
    done = torchrun(*small(pictures, "--out", "two", "--relabel", labels, *flags))
    assert done.returncode == 0, done.stderr
    state = checkpoint.load("two/last.pt")
    assert state["processes"] == 2 and state["config"]["dense"] and state["annotator"] == "hand at 64 px"


def torchrun(*flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "refiner_min.train", *flags]
    return subprocess.run(command, capture_output=True, text=True)


# ----------------------------------------------------------------------------------------------------------------------
# Stopping and going on


def start(pictures, out, *flags):
    command = [sys.executable, "-u", "-m", "refiner_min.train", *small(pictures, "--epochs", "6", "--out", out, *flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(pictures, out, *flags):
    assert train.main(small(pictures, "--epochs", "6", "--out", out, *flags)) == 0


def wait_for_step(process, step: int):
    """Until the run's table shows that many steps."""
    for line in process.stdout:
        words = line.split()
        if len(words) == 8 and words[1].isdigit() and int(words[1]) >= step:
            return
    raise AssertionError("the run ended before that")


def test_killed_and_resumed_is_as_never_stopped(pictures):
    finish(pictures, "whole")
    process = start(pictures, "killed")
    wait_for_step(process, 4)
    time.sleep(0.02 * torch.rand(()).item())
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    finish(pictures, "killed", "--resume")
    assert_same_runs("whole", "killed")


def test_killed_before_the_first_epoch_ended(pictures):
    process = start(pictures, "early")
    while not Path("early/last.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    finish(pictures, "early", "--resume")
    finish(pictures, "whole")
    assert_same_runs("whole", "early")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_how_to_go_on(pictures, number, status):
    process = start(pictures, "stopped", "--epochs", "400")
    wait_for_step(process, 2)
    process.send_signal(number)
    said = process.communicate()[0]
    assert process.returncode == status, said
    assert "Traceback" not in said
    command = re.search(r"to go on: python (-m refiner_min.train .* --out stopped .*--resume)$", said.strip()).group(1)
    step = checkpoint.load("stopped/last.pt")["step"]
    assert f"stopped after step {step};" in said
    process = subprocess.Popen([sys.executable, "-u", *command.split()], stdout=subprocess.PIPE, text=True)
    wait_for_step(process, step + 1)
    process.kill()
    process.communicate()


@pytest.mark.parametrize("streams", [False, True], ids=["decoded", "streamed"])
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_stopped_at_any_step_and_resumed_is_as_never_stopped(pictures, monkeypatch, streams, stop_after):
    """With everything that draws at random: order, crops, colour, erasing, mixup or cutmix, drop path."""
    if streams:
        monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    flags = small(pictures, "--mixup", "0.8", "--cutmix", "1", "--drop-path", "0.3", "--erasing", "0.5", "--colour",
                  "0.3", "--ema", "0.9", "--workers", "1", "--amp", "off")
    assert train.main([*flags, "--out", "whole"]) == 0

    def stop(self, step):
        self.signal = signal.SIGTERM if step == stop_after else self.signal
        return self.signal is not None

    monkeypatch.setattr(train.StopRequest, "agreed", stop)
    assert train.main([*flags, "--out", "stopped"]) == 143
    assert checkpoint.load("stopped/last.pt")["step"] == stop_after
    monkeypatch.setattr(train.StopRequest, "agreed", lambda *arguments: False)
    torch.manual_seed(99)  # another state of the generators
    assert train.main(["--resume", "stopped", "--device", "cpu", "--workers", "1"]) == 0
    assert_same_runs("whole", "stopped")


def test_a_damaged_checkpoint_costs_an_epoch_not_the_run(pictures, capsys):
    finish(pictures, "whole")
    finish(pictures, "damaged")
    (Path("damaged") / "last.pt").write_bytes(b"half of it")
    finish(pictures, "damaged", "--resume")
    assert "going on from the one before it" in capsys.readouterr().out
    assert_same_runs("whole", "damaged")


def test_resuming_with_other_flags_is_refused(pictures):
    assert train.main(small(pictures, "--out", "a")) == 0
    for flags, fields_named in ((["--lr", "0.5", "--expand", "2"], ("lr (", "0.5 here", "expand (3 there, 2 here)")),
                                (["--subset", "imagenette"], ("subset (folder there, imagenette here)",))):
        with pytest.raises(UserError) as error:
            train.main(["--resume", "a", "--device", "cpu", *flags])
        for named in ("a/last.pt was made with another configuration", *fields_named):
            assert named in str(error.value)
    other = make_folder(Path("other"), train=9, val=4)
    with pytest.raises(UserError, match=r"a/last.pt was made with another configuration: pictures \("):
        train.main(["--resume", "a", "--device", "cpu", "--data", str(other)])
    state = checkpoint.load("a/last.pt")
    Path("later").mkdir()
    checkpoint.save(state | {"recipe": state["recipe"] | {"later": 1}}, "later/last.pt")
    for flags in (["--resume", "later"], ["--eval", "--weights", "later/last.pt"]):
        with pytest.raises(UserError, match="later/last.pt was written by another version of refiner_min"):
            train.main([*flags, "--device", "cpu"])
    with pytest.raises(UserError, match="best.pt is no checkpoint to go on from"):
        train.main(["--resume", "a/best.pt", "--device", "cpu"])


# ----------------------------------------------------------------------------------------------------------------------
# Weights of another run


def test_starting_from_weights(pictures, tmp_path):
    assert train.main(small(pictures, "--out", "a")) == 0
    best = checkpoint.load("a/best.pt")
    run = run_of(pictures, "--weights", "a/best.pt", "--seed", "5", "--img-size", "24")  # another grid
    assert torch.equal(run.model.head.weight, best["model"]["head.weight"])
    assert run.model.position.shape[1] == 10
    other = make_folder(tmp_path / "other", classes=("a", "b", "c"))
    run = run_of(other, "--weights", "a/best.pt", "--seed", "5")  # other classes: a new head
    assert not torch.equal(run.model.head.weight, best["model"]["head.weight"])
    assert torch.equal(run.model.norm.weight, best["model"]["norm.weight"])
    with pytest.raises(UserError, match=r"a/best.pt was made with another configuration: expand \(3 there, 2 here\)"):
        run_of(pictures, "--weights", "a/best.pt", "--expand", "2")
    with pytest.raises(UserError, match="knows tench, .* not the classes of folder"):
        train.main(["--eval", "--weights", "a/best.pt", "--data", str(other), "--device", "cpu"])
    with pytest.raises(UserError, match=r"expand \(3 there, 2 here\)"):
        train.main(["--eval", "--weights", "a/best.pt", "--expand", "2", "--device", "cpu"])


def test_starting_from_published_weights(pictures):
    torch.manual_seed(1)
    source = refiner_vit_s(img_size=32)
    torch.save({"state_dict": published_state(source)}, "published.pth.tar")
    run = run_of(pictures, "--weights", "published.pth.tar", "--model", "s", "--patch-size", "16", "--img-size", "32")
    assert torch.equal(run.model.norm.weight, source.norm.weight)
    assert torch.equal(run.model.blocks[3].attention.qkv.weight, source.blocks[3].attention.qkv.weight)
    with pytest.raises(UserError, match="the weights do not fit"):
        run_of(pictures, "--weights", "published.pth.tar", "--model", "ti")


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_a_mistake_is_one_sentence_and_status_2(pictures):
    command = [sys.executable, "-m", "refiner_min.train", *small(pictures, "--batch-size", "1000")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert errors == ["error: --batch-size 1000 is larger than the 24 training pictures"]
    assert "Traceback" not in done.stderr and not Path("runs").exists()


@pytest.mark.parametrize("raised, status", [(UserError("what"), 2), (KeyboardInterrupt(), 130)])
def test_run_command(raised, status, capsys):
    def main():
        raise raised

    with pytest.raises(SystemExit) as error:
        run_command(main)
    assert error.value.code == status


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "last.pt", "best.pt"])
def test_another_run_is_not_overwritten(pictures, name):
    Path("mine").mkdir()
    (Path("mine") / name).write_text("precious")
    with pytest.raises(UserError, match=f"mine holds a run already .{name}."):
        train.main(small(pictures, "--out", "mine"))
    assert [file.read_text() for file in Path("mine").iterdir()] == ["precious"]


def test_an_out_that_cannot_be_made(pictures):
    Path("file").write_text("precious")
    with pytest.raises(UserError, match="--out file/run cannot be made"):
        train.main(small(pictures, "--out", "file/run"))
    assert Path("file").read_text() == "precious"


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(pictures, monkeypatch):
    real = train.F.cross_entropy

    def explode(logits, labels, **options):
        loss = real(logits, labels, **options)
        return loss * math.nan if "label_smoothing" in options and explode.step == 3 else count(loss, options)

    def count(loss, options):
        explode.step += "label_smoothing" in options
        return loss

    explode.step = 0
    monkeypatch.setattr(train.F, "cross_entropy", explode)
    with pytest.raises(UserError, match="the loss was not finite at step 3"):
        train.main(small(pictures, "--out", "a"))
    state = checkpoint.load("a/last.pt")
    assert state["step"] == 2 and all(value.isfinite().all() for value in state["model"].values())


def test_a_disk_that_fills_up(pictures):
    code = ("import resource, sys\nfrom refiner_min import run_command, train\n"
            "save = train.checkpoint.save\n"
            "def fill(state, path, **options):\n"
            "    if state.get('step'): resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
            "    save(state, path, **options)\n"
            "train.checkpoint.save = fill\n"
            "run_command(lambda: train.main(sys.argv[1:]))")
    command = [sys.executable, "-c", code, *small(pictures, "--out", "full")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "could not be written" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint.load("full/last.pt")["step"] == 0
