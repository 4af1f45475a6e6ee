"""Trains a Refiner-ViT: python -m refiner_min.train --subset imagenette

The command: its flags, a run begun or gone on with, saved weights evaluated. What is chosen for a subset is in recipes,
what a step does in engine, what stands in a run's folder in records.
Several GPUs or machines: torchrun --nproc-per-node 8 -m refiner_min.train --subset imagenet --data DIR
"""

import argparse
import math
import sys
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from refiner_min import UserError, checkpoint, data, distributed, hardware, out_of_memory, records, run_command, some
from refiner_min.compiling import settled
from refiner_min.engine import Run, fit
from refiner_min.evaluation import evaluate
from refiner_min.model import RefinerViT
from refiner_min.recipes import VERSION, Recipe, build_model, choose_recipe, published_recipe, saved_recipe
from refiner_min.splits import readers_told
from refiner_min.step import make_stream_augmentation
from refiner_min.stopping import claim

NOT_SAVED = {  # of the flags, with their defaults: how a run is done here and now, which a checkpoint does not say
    "save_every": 20.0, "device": None, "workers": None, "skip_bad": False, "eval_batch_size": None,
    "accumulate": 1, "checkpoint_maps": False, "log_every": 100, "tensorboard": False}


def parse(arguments=None) -> tuple[argparse.Namespace, dict]:
    """The command's own flags, and those of the recipe that were given."""
    parser = argparse.ArgumentParser(prog="python -m refiner_min.train", description="Train or evaluate a Refiner-ViT. "
                                     "What is not given comes from the subset's preset, and is printed first.")
    parser.add_argument("--subset", choices=data.SUBSETS, help="the data (default: digits, which is built in)")
    parser.add_argument("--data", metavar="DIR", help="folder with train/ and val/ (default: below data/, downloaded)")
    parser.add_argument("--relabel", metavar="DIR", help="learn from the label maps in this folder, not from the set's "
                        "labels; refiner_min.annotate makes them")
    parser.add_argument("--storage", choices=("memory", "stream"), help="decode the pictures once and keep them, or "
                        "read them as they are needed (default: by the size of the set)")
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/SUBSET)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one; mps is untested)")
    parser.add_argument("--workers", type=int, help="processes that read a streamed set (default: at most 16)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model "
                        "(default: where the run is long and a trial at its start finds it faster)")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="each process takes its part of a batch "
                        "in N parts, one after the other, as N GPUs would take it; --batch-size stays")
    parser.add_argument("--checkpoint-maps", action="store_true", help="compute refined maps again in the backward "
                        "pass: the same numbers in less memory, and slower")
    parser.add_argument("--skip-bad", action="store_true", help="leave out pictures that cannot be read")
    parser.add_argument("--resume", metavar="PATH", nargs="?", const="",
                        help="go on with the run in this folder (default: that of --out); auto: with that of --out, or "
                        "begin it where there is none, so that one command starts a run and restarts it")
    parser.add_argument("--save-every", type=float, default=20.0, metavar="MINUTES", help="save on the way, too, not "
                        "after every epoch only (default: 20)")
    parser.add_argument("--log-every", type=int, default=100, metavar="N", help="write a line each N steps to "
                        "steps.csv (default: 100; 0: none): loss, speed, waiting for data, memory")
    parser.add_argument("--tensorboard", action="store_true", help="write the same for TensorBoard, into the run's "
                        "folder tensorboard/")
    parser.add_argument("--weights", metavar="PATH", help="start from these weights, ours or published")
    parser.add_argument("--finetune", action="store_true", help="train --weights on with a small learning rate, at a "
                        "larger --img-size for instance: on ImageNet with token labeling's settings")
    parser.add_argument("--eval", action="store_true", help="evaluate --weights (default: best.pt of --out) and stop; "
                        "of --data, val/ is enough")
    parser.add_argument("--eval-batch-size", type=int, metavar="N", help="pictures a step of evaluation, over all "
                        "processes together (default: --batch-size, in training over --accumulate); L at 448 px: 1 GB, "
                        "and 0.5 GB a picture")
    parser.add_argument("--eval-weights", choices=("ema", "raw"), help="which of a file's weights --eval and --weights "
                        "take (default: of ours the moving average, of published ones the raw)")
    group = parser.add_argument_group("recipe", "(each subset has its own preset, on a GPU and on a CPU)")
    for item in fields(Recipe):
        how = {"action": argparse.BooleanOptionalAction} if item.type is bool else {
            "type": item.type, "choices": item.metadata["choices"]}
        name = f"--{item.name.replace('_', '-')}"
        group.add_argument(name, default=argparse.SUPPRESS, help=item.metadata["help"], **how)
    known = vars(parser.parse_args(arguments))
    hardware.check_workers(known["workers"])
    for name, low, high in (("eval_batch_size", 1, 2**24), ("accumulate", 1, 2**16), ("log_every", 0, 2**31)):
        if known[name] is not None and not low <= known[name] <= high:
            raise UserError(f"--{name.replace('_', '-')} {known[name]} must be at least {low} and at most {high}")
    if not known["save_every"] > 0:
        raise UserError(f"--save-every {known['save_every']:g} must be above 0")
    if known["finetune"] and not known["weights"] and known["resume"] in (None, "auto"):
        raise UserError("--finetune needs --weights PATH, the weights to begin with")
    if known["compile"] and known["checkpoint_maps"]:
        raise UserError("--compile does not go with --checkpoint-maps: leave one out")
    if known["eval"] and known["resume"] == "auto":
        known["resume"] = None
    given = {item.name: known.pop(item.name) for item in fields(Recipe) if item.name in known}
    return argparse.Namespace(**known), given


def folder_of(args: argparse.Namespace) -> Path:
    """The folder of the run that is meant."""
    return Path(args.out or f"runs/{args.subset or 'digits'}")


def open_subset(args: argparse.Namespace, recipe: Recipe, device: torch.device) -> data.Subset:
    """Say what was chosen, then open the data; of several processes on a machine, the first one alone downloads and
    decodes. UserError: as data.load_subset's."""
    main, count = distributed.is_main(), distributed.world()
    if main:
        processes = f", {count} processes" if count > 1 else ""
        print(f"{args.subset}: on {hardware.describe(device)}{processes}")
        print("recipe: " + ", ".join(f"{name} {value}" for name, value in asdict(recipe).items()), flush=True)
    workers = args.workers if args.workers is not None else hardware.default_workers()
    subset = data.load_subset(
        args.subset, args.data, recipe.img_size, only_val=args.eval, hold_out=recipe.hold_out, storage=args.storage,
        grid=recipe.img_size // recipe.patch_size, eval_crop=recipe.eval_crop, seed=recipe.seed, workers=workers,
        skip_bad=args.skip_bad, pin_memory=device.type == "cuda",
        transform=None if args.eval else make_stream_augmentation(recipe), labels=args.relabel)
    for split in filter(None, (subset.train, subset.val)):
        found = distributed.gathered(len(split))
        if len(set(found)) > 1:
            raise UserError(f"some processes find {min(found):,} pictures and others {max(found):,}: the machines' "
                            f"copies of {subset.root} differ")
    if count > len(subset.val):
        raise UserError(f"{count} processes are more than the {len(subset.val)} pictures to validate: start fewer")
    if main:
        training = f"{len(subset.train):,} pictures to train on{subset.train.note}; " if not args.eval else ""
        print(f"{training}{len(subset.val):,} to validate, {len(subset.classes)} classes")
        if subset.annotator:
            print(f"labels of the training pictures and their patches: {subset.annotator}")
    return subset


def check_fits(recipe: Recipe, subset: data.Subset, device: torch.device, accumulate: int):
    """UserError: the recipe asks for what this set, as it is stored, or this machine cannot do."""
    if recipe.batch_size > len(subset.train):
        raise UserError(f"--batch-size {recipe.batch_size} is larger than the {len(subset.train)} training pictures")
    parts = distributed.world() * accumulate
    if recipe.batch_size % parts:
        what = f"{parts}, the processes times --accumulate {accumulate}" if accumulate > 1 else f"the {parts} processes"
        raise UserError(f"--batch-size {recipe.batch_size} must be a multiple of {what}")
    if recipe.img_size == 2 and recipe.batch_size == parts:
        raise UserError(f"--batch-size {recipe.batch_size} is one picture at a time, and of --img-size 2 one place is "
                        f"left of it, over which BatchNorm cannot count: take more of either")
    if recipe.sync_bn and accumulate > 1:
        raise UserError("--sync-bn does not go with --accumulate: it would count over one part of a batch")
    if recipe.sync_bn and distributed.world() > 1 and device.type != "cuda":
        raise UserError("--sync-bn is for processes on GPUs: leave it out")
    if subset.storage == "stream":
        for flag, value, none in (("turn", recipe.turn, 0), ("crop-max", recipe.crop_max, 1)):
            if value > none:
                raise UserError(f"--{flag} {value:g} is for sets in memory: --storage memory, or --{flag} {none}")
    elif recipe.randaugment:
        raise UserError(f"--randaugment {recipe.randaugment:g} is for streamed sets: --storage stream, or "
                        f"--randaugment 0")


def check_saved(saved: dict, asked: dict, path):
    """UserError naming the fields in which what was asked for differs from what the file at path was made with."""
    differing = []
    for name, here in asked.items():
        there = saved.get(name)
        if there != here:
            if isinstance(here, list) and isinstance(there, list):  # of classes: the first that differs
                there, here = next((pair for pair in zip(there, here) if pair[0] != pair[1]), (len(there), len(here)))
            differing.append(f"{name} ({there} there, {here} here)")
    if differing:
        raise UserError(f"{path} was made with another configuration: {', '.join(differing)}")


def load_start(net: RefinerViT, state: dict, path, same_classes: bool, wanted: str | None = None):
    """Put the weights of state, ours or published and checked by config_of, into net; without the same classes its
    heads stay new. A token head that only one of the two has is left out, or stays new. UserError: what does not fit.
    """
    weights, which = checkpoint.weights_of(state, wanted, path)
    if "config" in state:
        free = ("img_size", "num_classes", "drop_path", "dense")
        asked = {name: value for name, value in asdict(net.config).items() if name not in free}
        check_saved(state["config"], asked, path)
    notes = ["their moving average" if which == "ema" else "raw"]
    own = {name: value for name, value in net.state_dict().items() if name.startswith("token_head.")}
    if own and "token_head.weight" not in weights:
        notes.append("the token head is new: it has none")
        weights = weights | own
    elif "token_head.weight" in weights and not own:
        notes.append("its token head is left out")
        weights = {name: value for name, value in weights.items() if not name.startswith("token_head.")}
    checkpoint.load_weights(net, weights, classifier=same_classes)
    if not same_classes:
        notes.append("for other classes, so the heads are new")
    if distributed.is_main():
        print(f"weights of {path}: {'; '.join(notes)}")


def new_run(args: argparse.Namespace, given: dict, device: torch.device) -> Run:
    """A run from the preset and the flags. UserError: its folder holds one already."""
    args.subset, out = args.subset or "digits", folder_of(args)
    recipe = distributed.from_first(  # whose number format is that of all
        lambda: choose_recipe(args.subset, device, given, args.relabel is not None, args.finetune))
    refuse_another(out)
    state = checkpoint.load(args.weights) if args.weights else None
    if state is not None:
        checkpoint.config_of(state, args.weights, args.eval_weights, needed=["classes"])
    subset = open_subset(args, recipe, device)
    check_fits(recipe, subset, device, args.accumulate)
    net = build_model(recipe, len(subset.classes), subset.channels)
    if state is not None:
        same = state["classes"] == subset.class_names if "config" in state else len(subset.classes) == 1000
        load_start(net, state, args.weights, same, args.eval_weights)
    return settled(Run(recipe, subset, net, device, out, **options_of(args)), args.compile)


def options_of(args: argparse.Namespace) -> dict:
    """What a Run is told besides its recipe: how this machine does it."""
    return dict(eval_batch=local_batch(args.eval_batch_size), accumulate=args.accumulate,
                checkpoint_maps=args.checkpoint_maps)


def begin(run: Run, arguments: list[str]):
    """Write what a run goes on from if it is killed in its first epoch, and what it is. Its folder is claimed: nobody
    else can begin one there. UserError: somebody has."""
    refuse_another(run.out)
    checkpoint.save(run.state(), run.out / "last.pt")
    records.begin(run, arguments)


def refuse_another(out: Path):
    """UserError: the folder holds a run."""
    try:
        held = [name for name in ("config.json", "metrics.csv", "last.pt", "best.pt") if (out / name).exists()]
    except OSError as error:
        raise UserError(f"--out {out} cannot be looked into ({error})") from None
    if held:
        raise UserError(f"{out} holds a run already ({held[0]}): --resume {out} goes on with it, --out DIR keeps both")


def local_batch(batch_size: int | None) -> int | None:
    """What one process takes of a batch; None stays None."""
    return batch_size and max(batch_size // distributed.world(), 1)


def checkpoint_of(args: argparse.Namespace) -> Path:
    """The file that --resume means."""
    path = Path(args.resume or folder_of(args))
    return path if path.suffix == ".pt" else path / "last.pt"


def resumed_run(args: argparse.Namespace, given: dict, device: torch.device) -> Run:
    """The run that is to go on. UserError: no such run, or flags and data that are not its own."""
    path = checkpoint_of(args)
    if args.weights or (args.out and Path(args.out) != path.parent):
        raise UserError(f"--resume {path} has its own weights and folder: leave out --weights and --out")
    state = checkpoint.load(path, set_aside=True)
    if "optimizer" not in state or "recipe" not in state:
        raise UserError(f"{path} is no checkpoint to go on from: --resume takes the folder of a run or its last.pt")
    checkpoint.check(state, path)
    if state.get("recipe_version") != VERSION:
        raise UserError(f"{path} was written by another version of refiner_min, whose recipes mean something else: "
                        f"begin the run again")
    checkpoint.config_of(state, path, needed=checkpoint.FIELDS)
    for name in ("subset", "data", "relabel", "storage"):
        setattr(args, name, getattr(args, name) or state[name])
    args.storage = None if args.subset in data.BUILT_IN else args.storage
    args.compile = state["compiled"] if args.compile is None else args.compile
    asked = {name: value for name, value in given.items() if value != "auto"}
    check_saved({"subset": state["subset"], **state["recipe"]}, {"subset": args.subset, **asked}, path)
    recipe = saved_recipe(state, path)
    subset = open_subset(args, recipe, device)
    net = build_model(recipe, len(subset.classes), subset.channels)
    check_fits(recipe, subset, device, args.accumulate)
    run = Run(recipe, subset, net, device, path.parent, **options_of(args))
    own = ("classes", "pictures", "annotator", "storage")
    check_saved(state, {name: run.origin()[name] for name in own}, path)
    try:
        run.restore(state)
    except ValueError as error:
        raise UserError(f"{path} is no checkpoint of this run: {error}") from None
    steps = distributed.gathered(run.step)
    if len(set(steps)) > 1:
        raise UserError(f"{path} is at step {min(steps)} for some processes and {max(steps)} for others: the machines' "
                        f"copies of {path.parent} differ")
    parts, now = state["processes"] * state["accumulate"], run.world * run.accumulate
    if run.rank == 0 and parts != now:
        print(f"begun with a batch in {parts} parts (processes, times --accumulate), it goes on with {now}: the order "
              f"of the pictures stays, BatchNorm counts over {run.local_batch} pictures now, and augmentation draws "
              f"other numbers")
    return settled(run, args.compile)


def evaluate_weights(args: argparse.Namespace, given: dict, device: torch.device):
    """Print the accuracy of saved weights, ours or published. Writes nothing but the cache of a set in memory.
    UserError: no such weights, or of other classes than the set's."""
    if args.relabel:
        raise UserError("--relabel does not go with --eval: validation pictures have no label maps")
    path = Path(args.weights or args.resume or folder_of(args))
    path = path / "best.pt" if path.is_dir() or not (args.weights or args.resume) else path
    state = checkpoint.load(path)
    config = checkpoint.config_of(state, path, args.eval_weights, needed=["subset", "data", "recipe", "classes"])
    if "config" in state:
        args.subset = args.subset or state["subset"]
        own = args.subset == state["subset"] and state["data"] and Path(state["data"]).is_dir()
        args.data = args.data or (state["data"] if own else None)  # others' weights: where this machine has the set
        recipe = replace(saved_recipe(state, path), **{"hold_out": 0.0} | given)  # val/, unless it is asked for
        recipe.check()
    else:
        args.subset = args.subset or "imagenet"
        recipe = published_recipe(args.subset, device, config, given)
    subset = open_subset(args, recipe, device)
    if "config" in state and state["classes"] != subset.class_names:
        raise UserError(f"{path} knows {some(state['classes'])}, not the classes of {args.subset}")
    if config.num_classes != len(subset.classes):
        raise UserError(f"{path} knows {config.num_classes} classes, not the {len(subset.classes)} of {args.subset}")
    net = build_model(recipe, len(subset.classes), subset.channels, config.dense)
    load_start(net, state, path, same_classes=True, wanted=args.eval_weights)
    score = evaluate(net.to(device), subset.val, device, local_batch(args.eval_batch_size or recipe.batch_size))
    if not math.isfinite(score.loss):
        raise UserError(f"{path} gives answers that are not finite")
    if distributed.is_main():
        print(score)


def train(args: argparse.Namespace, given: dict, device: torch.device, arguments: list[str]) -> int:
    """Begin a run or go on with one, to its end or until it is stopped. Returns the exit status."""
    if args.tensorboard:
        records.board_writer()
    if args.resume == "auto":
        args.resume = str(folder_of(args)) if distributed.from_first(lambda: begun(folder_of(args))) else None
        args.weights = args.weights if args.resume is None else None  # it has its own by now
    if args.resume is None:
        run = new_run(args, given, device)
        with claim(run.out) if run.rank == 0 else nullcontext():
            if run.rank == 0:
                begin(run, arguments)
            return go_on(run, args, arguments)
    out = checkpoint_of(args).parent  # claimed before it is read: the run that wrote it may not have ended yet
    with claim(out) if distributed.is_main() and out.is_dir() else nullcontext():
        run = resumed_run(args, given, device)
        if run.rank == 0:
            records.note_resumed(run)
        return go_on(run, args, arguments)


def go_on(run: Run, args: argparse.Namespace, arguments: list[str]) -> int:
    """Train a run to its end, or until it is stopped. Returns the exit status."""
    config = run.model.config
    if run.rank == 0:
        print(f"model {run.recipe.model}: {run.kind}, {config.depth} blocks, {run.parameters:,} parameters, "
              f"{config.img_size} px in {config.grid**2} patches", flush=True)
    log = records.StepLog(run, args.log_every, args.tensorboard)
    try:
        status = fit(run, records.command_line(resuming(args, run.out)), args.save_every, log)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        share = run.local_batch * run.accumulate
        more = next((parts for parts in range(run.accumulate + 1, share + 1) if share % parts == 0), None)
        parts = f"--accumulate {more} takes a batch in more parts, " if more else ""
        raise UserError(f"{run.local_batch} pictures of {run.recipe.img_size} px at once are too many for the memory: "
                        f"{parts}--checkpoint-maps needs less for each; --resume {run.out} goes on") from None
    if status == 0 and run.rank == 0:
        records.finish(run, arguments)
    return status


def begun(out: Path) -> bool:
    """Whether there is a run in the folder to go on with."""
    path = out / "last.pt"
    return path.exists() or checkpoint.backup_of(path).exists()


def resuming(args: argparse.Namespace, out: Path) -> list[str]:
    """The arguments that go on with the run: what the checkpoint does not hold, as it was given."""
    words = ["--resume", str(out)]
    for name, default in NOT_SAVED.items():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if value != default:
            words += [flag] if value is True else [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def main(arguments=None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args, given = parse(arguments)
    device = hardware.choose_device(args.device)
    with distributed.process_group(device), readers_told():
        try:
            if args.eval:
                evaluate_weights(args, given, device)
                return 0
            return train(args, given, device, arguments)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            less = "--eval-batch-size" if args.eval else "--batch-size, more parts of it (--accumulate)"
            raise UserError(f"the memory is too small: try a smaller {less} or --img-size") from None


if __name__ == "__main__":
    run_command(main)
