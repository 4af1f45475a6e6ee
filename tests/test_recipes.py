"""recipes.py: presets, what is chosen and derived, and the schedule, against the published ones."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from refiner_min import UserError, data, recipes, train
from refiner_min.recipes import Recipe, choose_recipe

CPU = torch.device("cpu")
TABLE = (Path(__file__).parents[1] / "notebooks" / "results" / "README.md").read_text()


def test_every_preset_names_its_command_and_every_subset_has_two():
    assert recipes.PRESETS.keys() == set(data.SUBSETS)
    for gpu, cpu in recipes.PRESETS.values():
        for preset in (gpu, cpu):
            assert "-m refiner_min.train" in preset.__doc__
            if preset().model == "ti":
                recipes.build_model(preset(), num_classes=2)


def test_the_imagenet_preset_is_the_published_recipe():
    short = choose_recipe("imagenet", CPU, {"epochs": 31})
    assert (short.warmup_epochs, short.cooldown_epochs) == (0.5, 1)  # a tenth of the run, a tenth of each
    large = choose_recipe("imagenet", CPU, {"batch_size": 1024, "amp": "off"})
    assert large.lr == pytest.approx(2e-3)  # 5e-4 at 256, scaled
    assert large.ema == pytest.approx(0.99996**4)  # over as many pictures
    recipe = choose_recipe("imagenet", CPU, {})
    published = dict(weight_decay=0.05, min_lr=1e-5, warmup_epochs=5, epochs=310, cooldown_epochs=10, mixup=0.8,
                     cutmix=1, smoothing=0.1, erasing=0.25, flip=0.5, crop_min=0.08, crop_max=1, randaugment=9,
                     ema=0.99996, drop_path=0.1, model="s", img_size=224, patch_size=16, eval_crop=0.9, lr=5e-4,
                     batch_size=256, mix_token=False, dense_weight=0, clip_grad=0, sync_bn=False, turn=0, colour=0)
    assert {name: getattr(recipe, name) for name in published} == published


@pytest.mark.parametrize("model, relabelled, drop_path, crop", [
    ("s", False, 0.1, 0.9), ("s", True, 0.2, 0.9), ("m", False, 0.2, 1.0), ("m", True, 0.25, 1.0),
    ("l", False, 0.2, 1.13), ("l", True, 0.25, 1.13)])
def test_what_the_published_files_set_for_each_model(model, relabelled, drop_path, crop):
    recipe = choose_recipe("imagenet", CPU, {"model": model}, relabelled)
    assert (recipe.drop_path, recipe.eval_crop, recipe.mix_token) == (drop_path, crop, relabelled)
    assert recipe.dense_weight == (0.5 if relabelled else 0)
    given = {"model": model, "drop_path": 0.03, "eval_crop": 0.8, "mix_token": False}
    recipe = choose_recipe("imagenet", CPU, given, relabelled)
    assert {name: getattr(recipe, name) for name in given} == given  # a flag always wins
    assert choose_recipe("imagenette", CPU, {"model": model}, relabelled).drop_path == 0  # on ImageNet only


def test_finetuning_is_token_labelings_on_imagenet_and_gentle_elsewhere():
    recipe = choose_recipe("imagenet", CPU, {"img_size": 384}, True, finetune=True)
    wanted = dict(img_size=384, batch_size=512, lr=5e-6, min_lr=5e-6, weight_decay=1e-8, drop_path=0.1, epochs=30,
                  warmup_epochs=0, cooldown_epochs=0, eval_crop=0.9, mix_token=True, mixup=0.8, randaugment=9)
    assert {name: getattr(recipe, name) for name in wanted} == wanted
    share = recipes.schedule(recipe, 10)
    assert {share(step) for step in range(300)} == {1.0}
    assert choose_recipe("imagenet", CPU, {"batch_size": 64}, finetune=True).lr == pytest.approx(5e-6 / 8)
    preset, gentle = recipes.Digits(), choose_recipe("digits", CPU, {}, finetune=True)
    assert (gentle.lr, gentle.epochs, gentle.warmup_epochs) == (preset.lr / 2, 6, 1)


PUBLISHED = [  # model, size, with token labels
    (model, size, True) for model, sizes in (("s", (224, 384)), ("m", (224, 384)), ("l", (224, 384, 448)))
    for size in sizes] + [(model, 224, False) for model in "sml"]


def published_commands() -> list[list[str]]:
    """The commands of each row of the table of published models."""
    table = TABLE[TABLE.index("## The published models"):].split("\n## ")[0]
    return [re.findall(r"`torchrun [^`]+-m refiner_min\.train ([^`]+)`", row) for row in table.splitlines()
            if row.startswith("| ") and "torchrun" in row]


@pytest.mark.parametrize("row, published", list(enumerate(PUBLISHED)), ids=str)
def test_the_commands_of_the_published_models_give_their_recipes(row, published):
    model, size, relabelled = published
    commands = published_commands()[row]
    assert len(commands) == 1 + (size > 224)
    for index, command in enumerate(commands):
        args, given = train.parse(shlex.split(command))
        recipe = choose_recipe(args.subset, CPU, given, args.relabel is not None, args.finetune)
        drop_paths, crop = {"s": ((0.1, 0.2), 0.9), "m": ((0.2, 0.25), 1.0), "l": ((0.2, 0.25), 1.13)}[model]
        assert (args.subset, recipe.model, recipe.img_size) == ("imagenet", model, (224, size)[index])
        assert (recipe.eval_crop, recipe.mix_token) == (crop, relabelled)
        assert args.finetune == bool(index) and bool(args.weights) == bool(index)
        assert recipe.drop_path == (0.1 if index else drop_paths[relabelled])
        assert (recipe.lr, recipe.batch_size) == ((5e-6, 512) if index else (5e-4, 256))
    if size > 224:  # it goes on from where the first one ends
        first, second = (train.parse(shlex.split(command))[0] for command in commands)
        assert second.weights == f"{first.out}/best.pt" and second.out != first.out


@pytest.mark.parametrize("flag, values", [
    *[(flag, ("inf", "-inf", "nan", "1e308", "-1")) for flag in (
        "--lr", "--min-lr", "--weight-decay", "--crop-max", "--crop-min", "--mixup", "--cutmix", "--clip-grad",
        "--dense-weight", "--warmup-epochs", "--ema", "--smoothing", "--drop-path", "--flip", "--turn", "--colour",
        "--randaugment", "--erasing", "--eval-crop", "--hold-out")],
    *[(flag, ("1e-10", "1e-300")) for flag in ("--mixup", "--cutmix", "--clip-grad")],  # a draw of Beta is 0 / 0
    *[(flag, (str(2**63), str(-2**63), str(10**30), "-1")) for flag in (
        "--seed", "--epochs", "--batch-size", "--img-size", "--patch-size", "--dim", "--depth", "--heads", "--expand",
        "--kernel-size", "--cooldown-epochs")]], ids=str)
def test_numbers_that_no_run_can_be_made_with(flag, values):
    for value in values:
        with pytest.raises(UserError, match=f"^{flag} .*must be"):
            choose_recipe("digits", CPU, train.parse([f"{flag}={value}"])[1])


def test_mixing_is_defined_at_both_ends_of_its_range():
    for alpha in (0.001, 1000.0):
        choose_recipe("digits", CPU, {"mixup": alpha})
        draws = torch.distributions.Beta(alpha, alpha).sample((1000,))
        assert draws.min() >= 0 and draws.max() <= 1 and draws.std() > 0


def test_a_model_that_no_memory_holds_is_told():
    with pytest.raises(UserError, match="no such model can be made here"):
        recipes.build_model(Recipe(dim=2**16, heads=2**16, depth=1000, img_size=2**14, patch_size=2), 10)


def test_a_given_learning_rate_is_not_scaled():
    assert choose_recipe("digits", CPU, {"batch_size": 96}).lr == pytest.approx(2 * recipes.Digits().lr)
    assert choose_recipe("digits", CPU, {"batch_size": 96, "lr": 0.5}).lr == 0.5


def test_sizes_that_are_not_given_are_the_models():
    for given, expected in (({}, (192, 6, 4)), ({"depth": 4, "dim": 96, "heads": 2}, (96, 4, 2)),
                            ({"model": "s", "depth": 2}, (384, 2, 12))):
        config = recipes.build_model(choose_recipe("imagenette", CPU, given), 10).config
        assert (config.dim, config.depth, config.heads) == expected
    with pytest.raises(UserError, match="heads=5 must divide dim=192"):
        recipes.build_model(choose_recipe("imagenette", CPU, {"heads": 5}), 10)


@pytest.mark.parametrize("field, norm", [("branch_scale", "reduce.1"), ("map_scale", "norm")])
def test_the_branch_and_the_refined_map_may_begin_small(field, norm):
    """Nothing else differs."""
    recipe = choose_recipe("imagenette", CPU, {field: 0.02})
    published, small = (recipes.build_model(recipe, 10) for _ in range(2))
    recipes.scale_refinements(small, recipe)
    other = {name for name, value in small.state_dict().items() if not torch.equal(value, published.state_dict()[name])}
    assert other == {f"blocks.{index}.attention.refinement.{norm}.weight" for index in (1, 3, 5)}
    assert all(small.state_dict()[name].tolist() == pytest.approx([0.02] * 4) for name in other)
    for words in ({"refine": False}, {"unrefined": True}, {"linear": True}):
        recipe = choose_recipe("imagenette", CPU, words | {field: 0.02})
        with pytest.raises(UserError, match=f"--{field.replace('_', '-')} 0.02 is of a refinement with BatchNorm"):
            recipes.scale_refinements(recipes.build_model(recipe, 10), recipe)


OTHER = {  # another value than any preset's, for every field of a recipe
    "model": "s", "dim": 96, "depth": 4, "heads": 2, "img_size": 24, "patch_size": 4, "refine": False, "share": False,
    "expand": 2, "kernel_size": 5, "linear": True, "unrefined": True, "branch_scale": 0.7, "map_scale": 0.7,
    "hold_out": 0.07, "drop_path": 0.07, "epochs": 3, "batch_size": 7, "lr": 0.007, "min_lr": 0.0007,
    "warmup_epochs": 0.7, "cooldown_epochs": 1, "weight_decay": 0.07, "ema": 0.7, "smoothing": 0.07,
    "dense_weight": 0.7, "token_labels": False, "mix_token": True, "mixup": 0.7, "cutmix": 0.7,
    "crop_min": 0.57, "crop_max": 1.7, "draft": False, "flip": 0.7, "turn": 7.0, "colour": 0.7, "randaugment": 7.5,
    "erasing": 0.7, "eval_crop": 1.13, "clip_grad": 0.7, "sync_bn": True, "validate_every": 7, "seed": 7, "amp": "off",
}


@pytest.mark.parametrize("name", [item.name for item in fields(Recipe)])
def test_every_field_is_a_flag(name):
    flag, value = f"--{name.replace('_', '-')}", OTHER[name]
    words = [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [flag, str(value)]
    _, given = train.parse(words)
    assert given == {name: value}
    assert train.parse([])[1] == {}
    recipe = choose_recipe("imagenette", CPU, given)
    assert getattr(recipe, name) == value
    if name == "linear":
        assert recipe.share is False


def test_the_schedule_is_the_published_one():
    with np.load(Path(__file__).parent / "data" / "recipe.npz") as numbers:
        published = numbers["schedule_lr_by_epoch"]
    recipe = choose_recipe("imagenet", CPU, {})
    for steps in (1, 7, 5004):
        share = recipes.schedule(recipe, steps)
        found = [recipe.lr * share(epoch * steps) for epoch in range(310)]
        np.testing.assert_allclose(found, published, atol=1e-9, rtol=0)


def test_schedule():
    """Between the epochs it moves every step: up in the warm-up, down in the cosine, not at all in the cool-down."""
    recipe = Recipe(lr=1e-2, min_lr=1e-4, epochs=10, cooldown_epochs=2, warmup_epochs=2)
    share = recipes.schedule(recipe, steps_per_epoch=5)
    values = [share(step) for step in range(50)]
    assert values[0] == pytest.approx(1e-4)  # 1e-6
    assert all(b - a == pytest.approx((1 - 1e-4) / 10) for a, b in zip(values[:9], values[1:10]))
    assert values[20] == pytest.approx(0.01 + 0.99 / 2)  # the middle of the cosine, which began with the warm-up
    assert values[10] == pytest.approx(0.01 + 0.99 * (1 + np.cos(np.pi / 4)) / 2)
    assert all(a > b for a, b in zip(values[10:40], values[11:41]))
    assert values[40:] == [pytest.approx(0.01)] * 10
    all_cool = Recipe(epochs=2, cooldown_epochs=2, warmup_epochs=0)
    assert recipes.schedule(all_cool, 5)(0) == pytest.approx(1e-2)
