"""All that decides a run's numbers: the recipe, each subset's presets, how one is chosen, its model and its schedule.

Every field of Recipe is a flag of refiner_min.train. It imports hardware, model and foreign, and nothing that trains.
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace

import torch

from refiner_min import UserError, foreign, hardware, model

VERSION = 3  # of what recipes mean: a run that was begun with another is not gone on with
MODELS = {name: getattr(model, f"refiner_vit_{name}") for name in ("ti", "s", "m", "l")}


def option(default, text: str, low=-math.inf, high=math.inf, choices=None, above=0):
    """A field of a recipe: its default, what it is, and the range that it must lie in; if it is not 0, which may stand
    for none, from above on."""
    return field(default=default, metadata={"help": text, "low": low, "high": high, "choices": choices, "above": above})


@dataclass(frozen=True)
class Recipe:
    """What a run is made of. Every field is a flag of the command; the subclasses are the presets."""

    model: str = option("ti", "size of the model", choices=tuple(MODELS))
    dim: int = option(0, "channels; 0: the model's", 0, 2**16)
    depth: int = option(0, "blocks; 0: the model's", 0, 1000)
    heads: int = option(0, "of attention; 0: the model's", 0, 2**16)
    img_size: int = option(64, "pixels a side", 2, 2**14)
    patch_size: int = option(8, "pixels a side of a patch", 2, 2**14)
    refine: bool = option(True, "refine the attention maps; --no-refine is a plain ViT of the same depth and width")
    share: bool = option(True, "blocks in pairs of own and shared map; --no-share refines every block's own")
    expand: int = option(3, "expanded maps a head; 1 for no expansion", 1, 1000)
    kernel_size: int = option(3, "of the local convolution on the maps; 1 for none", 1, 1001)
    linear: bool = option(False, "the paper's linear refinement, in every block (implies --no-share)")
    unrefined: bool = option(False, "pairs share the map as it is: what sharing alone does")
    branch_scale: float = option(1.0, "deviation with which the refinement's branch begins; 1, as published; 0 leaves "
                                 "it out: the map is only normalised", 0, 1000)
    map_scale: float = option(1.0, "size with which a refined map begins; 1, as published", 0.001, 1000)
    drop_path: float = option(0.0, "rate of stochastic depth at the last block", 0, 0.99)
    epochs: int = option(12, "passes over the training pictures", 1, 10**6)
    batch_size: int = option(64, "pictures a step, over all processes together", 1, 2**24)
    lr: float = option(1e-3, "peak learning rate; not given, the preset's is scaled with the batch size", 1e-12,
                       1000)
    min_lr: float = option(1e-5, "learning rate at the end of the cosine", 0, 1000)
    warmup_epochs: float = option(1.0, "epochs of linear warm-up; not given, fewer in a shorter run", 0, 10**6)
    cooldown_epochs: int = option(0, "last epochs, at min-lr; not given, fewer in a shorter run", 0, 10**6)
    weight_decay: float = option(0.05, "AdamW's, on matrices and kernels only", 0, 1000)
    ema: float = option(0.0, "decay of the weights' moving average, which is what is evaluated, 0 for none; not given, "
                        "the preset's for the same number of pictures", 0, 1)
    smoothing: float = option(0.1, "label smoothing", 0, 1)
    dense_weight: float = option(0.0, "weight of the patch tokens' loss, 0.5 with --relabel; 0: no token head", 0,
                                 1000)
    token_labels: bool = option(True, "the patch tokens learn from token labels where there are any; with "
                                "--no-token-labels, and where there are none, each from its picture's label")
    mix_token: bool = option(False, "MixToken: swap a box of tokens with another picture's")
    mixup: float = option(0.0, "alpha of mixup; 0 for none. With cutmix too, each batch gets one of the two", 0, 1000,
                          above=0.001)
    cutmix: float = option(0.0, "alpha of cutmix; 0 for none", 0, 1000, above=0.001)
    crop_min: float = option(0.35, "smallest area of a random crop, as a share of the picture's", 0.001, 1)
    crop_max: float = option(1.0, "largest; above 1 zooms out (sets in memory)", 0.001, 100)
    draft: bool = option(True, "decode a large JPEG at 1/2, 1/4 or 1/8 of its size where its crop needs no more "
                         "(streamed sets); not as published")
    flip: float = option(0.5, "probability of a mirrored picture", 0, 1)
    turn: float = option(0.0, "degrees to either side (sets in memory)", 0, 180)
    colour: float = option(0.0, "strength of brightness, contrast and saturation changes", 0, 1)
    randaugment: float = option(0.0, "mean magnitude of RandAugment out of 10, 0 for none (streamed sets)", 0, 10)
    erasing: float = option(0.0, "probability of random erasing", 0, 1)
    eval_crop: float = option(1.0, "share of the shorter side that evaluation looks at; above 1 between black borders",
                              0.01, 2)
    hold_out: float = option(0.0, "validate on this share of each class's training pictures, left out of training, and "
                             "not on val/: to choose recipes by", 0, 0.5)
    clip_grad: float = option(0.0, "largest norm of all gradients together; 0, as published: any", 0, 10**6, above=1e-6)
    sync_bn: bool = option(False, "BatchNorm counts over all processes together; not as published")
    validate_every: int = option(1, "epochs from one validation to the next; one always follows the last epoch", 1,
                                 10**6)
    seed: int = option(0, "of the weights, the order and the augmentation", 0, 2**32 - 1)
    amp: str = option("auto", "number format of the matrix products; auto: bf16 where it is faster",
                      choices=("auto", "bf16", "fp16", "off"))

    def check(self):
        """UserError naming the first field that is out of its range, or those that do not go together."""
        self.check_ranges()
        if self.crop_min > self.crop_max:
            raise UserError(f"--crop-min {self.crop_min} must not be above --crop-max {self.crop_max}")
        if self.warmup_epochs + self.cooldown_epochs > self.epochs:
            raise UserError(f"--warmup-epochs {self.warmup_epochs:g} and --cooldown-epochs {self.cooldown_epochs} must "
                            f"fit into --epochs {self.epochs}")

    def check_ranges(self):
        """UserError naming the first field that is out of its range."""
        for item in fields(Recipe):
            value, choices, low, high, above = getattr(self, item.name), *map(
                item.metadata.get, ("choices", "low", "high", "above"))
            flag = f"--{item.name.replace('_', '-')} {value}"
            if item.type in (int, float) and not low <= value <= high:  # nan is not
                raise UserError(f"{flag} must be at least {low:g} and at most {high:g}")
            if item.type is float and 0 < value < above:
                raise UserError(f"{flag} must be 0 or at least {above:g}")
            if choices and value not in choices:
                raise UserError(f"{flag} must be one of {', '.join(choices)}")


SIZES = ("dim", "depth", "heads")  # fields in which 0 is the model's own
OF_MODEL = {item.name for item in fields(model.RefinerConfig)} & {item.name for item in fields(Recipe)}


@dataclass(frozen=True)
class Digits(Recipe):
    """python -m refiner_min.train

    The 1,797 built-in digits, 1,442 to train on and 355 to validate, 32 px in 16 patches. On two cores of an AMD EPYC
    with bf16: 0.7 minutes, 99.3 % (mean of three seeds; notebooks/results/digits-cpu-seed*.json).
    """

    img_size: int = 32
    epochs: int = 24
    batch_size: int = 48
    lr: float = 2e-3
    warmup_epochs: float = 2.0
    ema: float = 0.98
    smoothing: float = 0.0
    crop_min: float = 0.7
    crop_max: float = 1.5
    flip: float = 0.0
    turn: float = 15.0


@dataclass(frozen=True)
class DigitScenes(Recipe):
    """python -m refiner_min.train --subset digit-scenes

    Scenes of up to four of the digits, 32 px in 64 patches whose labels are known; 10,000 new ones an epoch, 1,000 to
    validate. On two cores of an AMD EPYC with bf16: 1.2 minutes, 95.9 % of the pictures, 80.9 % of the tokens (mean of
    three seeds; notebooks/results/digit-scenes-cpu-tokens-seed*.json). The patch tokens' loss weighs eight times
    what is published: with 0.5, tokens had by then hardly begun to name their own digit.
    """

    img_size: int = 32
    patch_size: int = 4
    epochs: int = 2
    lr: float = 2e-3
    warmup_epochs: float = 0.5
    ema: float = 0.99
    smoothing: float = 0.0
    dense_weight: float = 4.0


@dataclass(frozen=True)
class Photos(Recipe):
    """python -m refiner_min.train --subset imagenette

    Imagenette, Imagewoof or a folder of one's own on one recent GPU: 128 px in 256 patches. Meant for less than 10
    minutes on Imagenette; not measured yet, so no accuracy is given.
    """

    img_size: int = 128
    epochs: int = 100
    batch_size: int = 128
    warmup_epochs: float = 5.0
    drop_path: float = 0.1
    ema: float = 0.998
    mixup: float = 0.8
    cutmix: float = 1.0
    crop_min: float = 0.2
    colour: float = 0.4
    erasing: float = 0.25


@dataclass(frozen=True)
class PhotosOnCPU(Recipe):
    """python -m refiner_min.train --subset imagenette --device cpu

    The same sets without a GPU: 64 px in 64 patches, 12 epochs. Imagenette on two cores of a Xeon in
    float32: 16 minutes, 68.0 ± 1.1 % (three seeds; notebooks/results/study.md).
    """

    ema: float = 0.99
    colour: float = 0.3


@dataclass(frozen=True)
class ImageNet(Recipe):
    """torchrun --nproc-per-node 8 -m refiner_min.train --subset imagenet --data DIR

    The published recipe (scripts/refiner_s.yaml, and with --relabel refiner_s_relabel.yaml, accuracy 83.6 %): S at
    224 px; M and L: --model m, --model l. What their files set differently is in PUBLISHED. None was run by us. The
    learning rate 5e-4 is taken for a batch of 256 (8 x 32): our reading, since the number of GPUs is not published, and
    it is scaled with the batch. Where we differ: DIFFERENCES.md.
    On a CPU it is the same recipe: it would take months.
    """

    model: str = "s"
    img_size: int = 224
    patch_size: int = 16
    drop_path: float = 0.1
    epochs: int = 310
    cooldown_epochs: int = 10
    batch_size: int = 256
    lr: float = 5e-4
    warmup_epochs: float = 5.0
    ema: float = 0.99996
    mixup: float = 0.8
    cutmix: float = 1.0
    crop_min: float = 0.08
    randaugment: float = 9.0
    erasing: float = 0.25
    eval_crop: float = 0.9


PRESETS = {  # subset: preset on a GPU, preset on a CPU
    "digits": (Digits, Digits),
    "digit-scenes": (DigitScenes, DigitScenes),
    "imagenette": (Photos, PhotosOnCPU),
    "imagewoof": (Photos, PhotosOnCPU),
    "folder": (Photos, PhotosOnCPU),
    "imagenet": (ImageNet, ImageNet),
}


PUBLISHED = {  # model: drop path without and with token labels (scripts/*.yaml), evaluation's crop (default_cfgs)
    "s": (0.1, 0.2, 0.9),
    "m": (0.2, 0.25, 1.0),
    "l": (0.2, 0.25, 1.13),
}
FINETUNING = dict(  # token labeling's for 384 px (its README) and its EMA; how many epochs is not known: 30 is ours
    batch_size=512, lr=5e-6, min_lr=5e-6, weight_decay=1e-8, drop_path=0.1, ema=0.99992, epochs=30, warmup_epochs=0.0,
    cooldown_epochs=0)


def published_settings(subset: str, size: str, relabelled: bool) -> dict:
    """What the published files of a model set differently from the preset, by the names of a Recipe's fields."""
    if subset != "imagenet" or size not in PUBLISHED:
        return {}
    *drop_paths, crop = PUBLISHED[size]
    return {"drop_path": drop_paths[relabelled], "mix_token": relabelled, "eval_crop": crop}


def published_name(config: model.RefinerConfig) -> str | None:
    """The one of MODELS that has this width, depth and number of heads."""
    for name, build in MODELS.items():
        with torch.device("meta"):
            known = build().config
        if (known.dim, known.depth, known.heads) == (config.dim, config.depth, config.heads):
            return name
    return None


def published_crop(config: model.RefinerConfig) -> float:
    """The share of the shorter side at which a published model is evaluated; 1 for others."""
    return PUBLISHED.get(published_name(config), (1.0,))[-1]


def published_recipe(subset: str, device: torch.device, config: model.RefinerConfig, given: dict) -> Recipe:
    """The recipe that evaluates published weights as they were. UserError: they are of none of MODELS."""
    name = published_name(config)
    if name is None:
        raise UserError(f"published weights of dim {config.dim}, depth {config.depth} and {config.heads} heads are of "
                        f"none of the models {', '.join(MODELS)}")
    shape = {name: value for name, value in asdict(config).items() if name in OF_MODEL}
    return choose_recipe(subset, device, {"model": name, "eval_crop": published_crop(config)} | shape | given)


def finetuning_settings(subset: str, preset: Recipe) -> dict:
    """What --finetune sets: on ImageNet token labeling's; elsewhere half the rate for a quarter of the epochs, ours."""
    if subset == "imagenet":
        return FINETUNING
    return dict(lr=preset.lr / 2, epochs=math.ceil(preset.epochs / 4), warmup_epochs=min(preset.warmup_epochs, 1.0),
                cooldown_epochs=0)


def choose_recipe(subset: str, device: torch.device, given: dict, relabelled: bool = False,
                  finetune: bool = False) -> Recipe:
    """The subset's preset with the flags that were given; relabelled: with --relabel; finetune: with --finetune.
    UserError: a value that is out of its range."""
    preset = PRESETS[subset][device.type == "cpu"]()
    preset = replace(preset, **published_settings(subset, given.get("model", preset.model), relabelled))
    if finetune:
        preset = replace(preset, **finetuning_settings(subset, preset))
    if given.get("linear"):
        given = {"share": False} | given
    recipe = replace(preset, **given)
    recipe.check_ranges()  # before anything is derived from them
    shorter, larger = min(recipe.epochs / preset.epochs, 1), recipe.batch_size / preset.batch_size
    derived = {"lr": preset.lr * larger, "ema": preset.ema**larger, "warmup_epochs": preset.warmup_epochs * shorter,
               "cooldown_epochs": int(preset.cooldown_epochs * shorter), "amp": hardware.hardware_amp(device),
               "dense_weight": 0.5 if relabelled else preset.dense_weight}
    recipe = replace(recipe, **{name: value for name, value in derived.items() if given.get(name, "auto") == "auto"})
    recipe.check()
    return recipe


def saved_recipe(state: dict, path) -> Recipe:
    """The recipe that the file of ours at path was made with. UserError: one that this version does not know, of
    another model than the file's, or for a set of an unknown kind."""
    try:
        foreign.check_fields(state["recipe"], {item.name: item.type for item in fields(Recipe)})
        recipe = Recipe(**state["recipe"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} was written by another version of refiner_min ({error})") from None
    try:
        recipe.check()
    except UserError as error:
        raise UserError(f"{path} was made with a recipe that cannot be: {error}") from None
    if state.get("subset", "digits") not in PRESETS:
        raise UserError(f"{path} was made on a set of an unknown kind, {state['subset']}")
    saved = {name: value for name, value in asdict(recipe).items() if name in OF_MODEL and (value or name not in SIZES)}
    differing = [name for name, value in saved.items() if state["config"].get(name) != value]
    if differing:
        raise UserError(f"{path} was made with a recipe of another model than it holds: {', '.join(differing)}")
    return recipe


def build_model(recipe: Recipe, num_classes: int, channels: int = 3, dense: bool | None = None) -> model.RefinerViT:
    """The model of the recipe, untrained; dense: with a token head, by default where the recipe teaches it. UserError:
    no such model can be."""
    chosen = {name: value for name, value in asdict(recipe).items()
              if name in OF_MODEL and (value or name not in SIZES)}
    torch.manual_seed(recipe.seed)
    try:
        return MODELS[recipe.model](num_classes=num_classes, in_channels=channels,
                                    dense=recipe.dense_weight > 0 if dense is None else dense, **chosen)
    except (ValueError, RuntimeError, MemoryError) as error:  # torch's, where the memory does not hold it
        raise UserError(f"no such model can be made here: {(str(error) or 'out of memory').splitlines()[0]}") from None


def scale_refinements(net: model.RefinerViT, recipe: Recipe):
    """Let what a refinement adds to a map begin with the deviation branch_scale instead of 1, at 0 staying at nothing,
    and the refined map with map_scale times the published size. Beside a deviation of 1 the map itself, of about 0.001
    when untrained and 0.02 when trained (ti), is nothing. UserError: there is no refinement with BatchNorm."""
    refinements = [module for module in net.modules()
                   if isinstance(module, model.Refinement) and module.norm is not None]
    for name, norms in (("branch_scale", [refinement.reduce[1] for refinement in refinements]),
                        ("map_scale", [refinement.norm for refinement in refinements])):
        scale = getattr(recipe, name)
        if scale == 1:  # given weights keep theirs
            continue
        if not norms:
            raise UserError(f"--{name.replace('_', '-')} {scale:g} is of a refinement with BatchNorm, which this model "
                            "does not have")
        for norm in norms:
            torch.nn.init.constant_(norm.weight, scale).requires_grad_(scale > 0)


WARMUP_LR = 1e-6  # where the warm-up begins, as published


def schedule(recipe: Recipe, steps_per_epoch: int):
    """The learning rate as a share of the peak, by step: linear warm-up; cosine from the first epoch to min_lr, out of
    which the warm-up is cut; cool-down at min_lr. At an epoch's first step the published rate, which stays for the
    epoch; ours moves every step. Source: published (timm's CosineLRScheduler)."""
    end = recipe.epochs - recipe.cooldown_epochs
    first, floor = min(WARMUP_LR / recipe.lr, 1), min(recipe.min_lr / recipe.lr, 1)

    def share(step: int) -> float:
        epoch = step / steps_per_epoch
        if epoch < recipe.warmup_epochs:
            return first + (1 - first) * epoch / recipe.warmup_epochs
        if epoch >= end:
            return floor
        return floor + (1 - floor) * (1 + math.cos(math.pi * epoch / end)) / 2

    return share
