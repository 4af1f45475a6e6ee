"""recipes.py: presets, what is chosen and derived, and the schedule."""

from dataclasses import fields

import pytest
import torch

from refiner_min import data, recipes, train
from refiner_min.recipes import Recipe, choose_recipe

CPU = torch.device("cpu")


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
    recipe = choose_recipe("imagenet", CPU, {"batch_size": 1024, "amp": "off"})
    assert recipe.lr == pytest.approx(2e-3)  # 5e-4 at 256, scaled
    published = dict(weight_decay=0.05, min_lr=1e-5, warmup_epochs=5, epochs=310, cooldown_epochs=10, mixup=0.8,
                     cutmix=1, smoothing=0.1, erasing=0.25, flip=0.5, crop_min=0.08, crop_max=1, randaugment=9,
                     ema=0.99996, drop_path=0.1, model="s", img_size=224, patch_size=16, eval_crop=0.9)
    assert {name: getattr(recipe, name) for name in published} == published


def test_a_given_learning_rate_is_not_scaled():
    assert choose_recipe("digits", CPU, {"batch_size": 96}).lr == pytest.approx(2 * recipes.Digits().lr)
    assert choose_recipe("digits", CPU, {"batch_size": 96, "lr": 0.5}).lr == 0.5

OTHER = {  # another value than any preset's, for every field of a recipe
    "model": "s", "img_size": 24, "patch_size": 4, "refine": False, "share": False, "expand": 2, "kernel_size": 5,
    "linear": True, "drop_path": 0.07, "epochs": 3, "batch_size": 7, "lr": 0.007, "min_lr": 0.0007,
    "warmup_epochs": 0.7, "cooldown_epochs": 1, "weight_decay": 0.07, "ema": 0.7, "smoothing": 0.07,
    "dense_weight": 0.7, "token_labels": False, "mix_token": True, "mixup": 0.7, "cutmix": 0.7,
    "crop_min": 0.57, "crop_max": 1.7, "flip": 0.7, "turn": 7.0, "colour": 0.7, "randaugment": 7, "erasing": 0.7,
    "eval_crop": 0.7, "seed": 7, "amp": "off",
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


def test_schedule():
    recipe = Recipe(lr=1e-2, min_lr=1e-4, epochs=10, cooldown_epochs=2, warmup_epochs=2)
    share = recipes.schedule(recipe, steps_per_epoch=5)
    values = [share(step) for step in range(50)]
    assert values[0] == pytest.approx(1 / 11)  # not at full rate
    assert all(b - a == pytest.approx(1 / 11) for a, b in zip(values[:9], values[1:10]))
    assert values[10] == 1.0 and max(values) == 1.0
    assert values[25] == pytest.approx(0.01 + 0.99 / 2)  # the middle of the cosine
    assert all(a > b for a, b in zip(values[10:40], values[11:41]))
    assert values[40:] == [pytest.approx(0.01)] * 10
