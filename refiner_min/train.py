"""Trains a Refiner-ViT: python -m refiner_min.train --subset imagenette

The command: its flags, a run begun or gone on with, saved weights evaluated. What is chosen for a subset is in recipes,
what a step does in engine, what stands in a run's folder in records.
Several GPUs or machines: torchrun --nproc-per-node 8 -m refiner_min.train --subset imagenet --data DIR
"""

import argparse
import json
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from refiner_min import UserError, checkpoint, data, distributed, hardware, records, run_command
from refiner_min.augment import StreamAugmentation
from refiner_min.engine import Run, evaluate, fit
from refiner_min.model import RefinerViT
from refiner_min.recipes import Recipe, build_model, choose_recipe


def parse(arguments=None) -> tuple[argparse.Namespace, dict]:
    """The command's own flags, and those of the recipe that were given."""
    parser = argparse.ArgumentParser(prog="python -m refiner_min.train", description="Train or evaluate a Refiner-ViT. "
                                     "What is not given comes from the subset's preset, and is printed first.")
    parser.add_argument("--subset", choices=data.SUBSETS, help="the data (default: digits, which is built in)")
    parser.add_argument("--data", metavar="DIR", help="folder with train/ and val/ (default: below data/, downloaded)")
    parser.add_argument("--relabel", metavar="DIR", help="learn from the label maps in this folder, not from the set's "
                        "labels; refiner_min.annotate makes them")
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/SUBSET)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one; mps is untested)")
    parser.add_argument("--workers", type=int, help="processes that read a streamed set (default: the cores, at most "
                        "16, over the processes on this machine)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model: slow to start, then faster")
    parser.add_argument("--skip-bad", action="store_true", help="leave out pictures that cannot be read")
    parser.add_argument("--resume", metavar="PATH", nargs="?", const="",
                        help="go on with the run in this folder (default: that of --out)")
    parser.add_argument("--weights", metavar="PATH", help="start from these weights, ours or published")
    parser.add_argument("--eval", action="store_true", help="evaluate --weights (default: best.pt of --out) and stop; "
                        "of --data, val/ is enough")
    group = parser.add_argument_group("recipe", "(each subset has its own preset, on a GPU and on a CPU)")
    for item in fields(Recipe):
        how = {"action": argparse.BooleanOptionalAction} if item.type is bool else {
            "type": item.type, "choices": item.metadata["choices"]}
        name = f"--{item.name.replace('_', '-')}"
        group.add_argument(name, default=argparse.SUPPRESS, help=item.metadata["help"], **how)
    known = vars(parser.parse_args(arguments))
    if (known["workers"] or 0) < 0:
        raise UserError(f"--workers {known['workers']} must be at least 0")
    given = {item.name: known.pop(item.name) for item in fields(Recipe) if item.name in known}
    return argparse.Namespace(**known), given


def folder_of(args: argparse.Namespace) -> Path:
    return Path(args.out or f"runs/{args.subset or 'digits'}")


def open_subset(args: argparse.Namespace, recipe: Recipe, device: torch.device) -> data.Subset:
    """Say what was chosen, then open the data; of several processes on a machine, the first one alone downloads and
    decodes."""
    main = distributed.is_main()
    if main:
        processes = f", {distributed.world()} processes" if distributed.world() > 1 else ""
        print(f"{args.subset}: on {hardware.describe(device)}{processes}")
        print("recipe: " + ", ".join(f"{name} {value}" for name, value in asdict(recipe).items()), flush=True)
    workers = args.workers if args.workers is not None else hardware.default_workers()
    transform = StreamAugmentation(recipe.img_size, (recipe.crop_min, min(recipe.crop_max, 1)), recipe.flip,
                                   recipe.randaugment)
    with distributed.first_alone():
        subset = data.load_subset(
            args.subset, args.data, recipe.img_size, only_val=args.eval, grid=recipe.img_size // recipe.patch_size,
            eval_crop=recipe.eval_crop, seed=recipe.seed, workers=workers, skip_bad=args.skip_bad, transform=transform,
            labels=args.relabel)
    if main:
        training = f"{len(subset.train):,} pictures to train on, " if subset.train is not None else ""
        print(f"{training}{len(subset.val):,} to validate, {len(subset.classes)} classes{subset.val.note}")
        if subset.annotator:
            print(f"labels of the training pictures and their patches: {subset.annotator}")
    return subset


def check_saved(saved: dict, asked: dict, path):
    """UserError naming the fields in which what was asked for differs from what the file at path was made with."""
    differing = [f"{name} ({saved.get(name)} there, {value} here)" for name, value in asked.items()
                 if saved.get(name) != value]
    if differing:
        raise UserError(f"{path} was made with another configuration: {', '.join(differing)}")


def saved_recipe(state: dict, path) -> Recipe:
    """The recipe that the file at path was made with. UserError: one that this version does not know."""
    try:
        return Recipe(**state["recipe"])
    except TypeError as error:
        raise UserError(f"{path} was written by another version of refiner_min ({error})") from None


def load_start(net: RefinerViT, state: dict, path, same_classes: bool):
    """Put the weights of state, ours or published, into net; without the same classes its heads stay new."""
    if "config" not in state:
        return checkpoint.load_released(net, state, classifier=same_classes)
    free = ("img_size", "num_classes", "drop_path", "dense")
    asked = {name: value for name, value in asdict(net.config).items() if name not in free}
    check_saved(state["config"], asked, path)
    return checkpoint.load_weights(net, state.get("ema") or state["model"], classifier=same_classes)


def new_run(args: argparse.Namespace, given: dict, device: torch.device, arguments: list[str]) -> Run:
    """A run from the preset and the flags, its folder made. UserError: the folder holds a run; nothing is written."""
    args.subset, out = args.subset or "digits", folder_of(args)
    recipe = choose_recipe(args.subset, device, given, relabelled=args.relabel is not None)
    try:
        held = [name for name in ("config.json", "metrics.csv", "last.pt", "best.pt") if (out / name).exists()]
    except OSError as error:
        raise UserError(f"--out {out} cannot be looked into ({error})") from None
    if held:
        raise UserError(f"{out} holds a run already ({held[0]}): --resume {out} goes on with it, --out DIR keeps both")
    state = checkpoint.load(args.weights) if args.weights else None
    subset = open_subset(args, recipe, device)
    check_batch(recipe, subset)
    net = build_model(recipe, len(subset.classes), subset.channels)
    if state is not None:
        same = state["classes"] == subset.class_names if "config" in state else len(subset.classes) == 1000
        load_start(net, state, args.weights, same)
    run = Run(recipe, subset, net, device, out, args.compile)
    if run.rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out} cannot be made ({error})") from None
        records.write_config(out, records.facts(run.origin(), run.parameters, device, arguments))
    return run


def check_batch(recipe: Recipe, subset: data.Subset):
    if recipe.batch_size > len(subset.train):
        raise UserError(f"--batch-size {recipe.batch_size} is larger than the {len(subset.train)} training pictures")
    if recipe.batch_size % distributed.world():
        raise UserError(f"--batch-size {recipe.batch_size} must be a multiple of the {distributed.world()} processes")


def resumed_run(args: argparse.Namespace, given: dict, device: torch.device) -> Run:
    """The run that is to go on. UserError: no such run, or flags and data that are not its own."""
    path = Path(args.resume or folder_of(args))
    path = path if path.suffix == ".pt" else path / "last.pt"
    if args.weights or (args.out and Path(args.out) != path.parent):
        raise UserError(f"--resume {path} has its own weights and folder: leave out --weights and --out")
    state = checkpoint.load(path)
    if "optimizer" not in state or "recipe" not in state:
        raise UserError(f"{path} is no checkpoint to go on from: --resume takes the folder of a run or its last.pt")
    args.subset, args.data = args.subset or state["subset"], args.data or state["data"]
    args.relabel = args.relabel or state["relabel"]
    check_saved({"subset": state["subset"], **state["recipe"]}, {"subset": args.subset, **given}, path)
    recipe = saved_recipe(state, path)
    subset = open_subset(args, recipe, device)
    run = Run(recipe, subset, build_model(recipe, len(subset.classes), subset.channels), device, path.parent,
              args.compile)
    check_saved(state, {name: run.origin()[name] for name in ("classes", "pictures", "processes", "annotator")}, path)
    run.restore(state)
    return run


def finish(run: Run, arguments: list[str]):
    """Complete the run's folder and say where the results are."""
    records.write_history(run.out, run.history, run.title)
    result = records.results(run.history, averaged=run.ema is not None)
    path = run.out / "config.json"
    record = json.loads(path.read_text()) if path.exists() else records.facts(run.origin(), run.parameters, run.device,
                                                                              arguments)
    records.write_config(run.out, record | {"result": result})
    weights = "the weights' moving average" if run.ema is not None else "the weights"
    print(f"accuracy {result['accuracy']:.2%} with {weights} (best {result['best_accuracy']:.2%} after epoch "
          f"{result['best_epoch']}), {result['training_minutes']:.1f} minutes of training: {run.out}/best.pt, "
          f"curves.png")


def evaluate_weights(args: argparse.Namespace, given: dict, device: torch.device):
    """Print the accuracy of saved weights, ours or published. Writes nothing but the cache of a decoded set."""
    if args.relabel:
        raise UserError("--relabel does not go with --eval: validation pictures have no label maps")
    path = Path(args.weights or folder_of(args) / "best.pt")
    state = checkpoint.load(path)
    ours = "config" in state
    args.subset = args.subset or (state["subset"] if ours else "digits")
    if ours:
        args.data = args.data or (state["data"] if args.subset == state["subset"] else None)
        recipe = replace(saved_recipe(state, path), **given)
        recipe.check()
    else:
        recipe = choose_recipe(args.subset, device, given)
    subset = open_subset(args, recipe, device)
    if ours and state["classes"] != subset.class_names:
        raise UserError(f"{path} knows {', '.join(state['classes'][:3])}, ..., not the classes of {args.subset}")
    dense = None if ours else True  # the published models evaluate with both heads
    net = build_model(recipe, len(subset.classes), subset.channels, dense)
    load_start(net, state, path, same_classes=True)
    batch_size = max(recipe.batch_size // distributed.world(), 1)
    score = evaluate(net.to(device), subset.val, device, batch_size, recipe.eval_crop)
    if distributed.is_main():
        tokens = f", of tokens {score.token_accuracy:.4%}" if score.token_accuracy is not None else ""
        print(f"accuracy {score.accuracy:.4%} ({score.right} of {score.count}){tokens}, loss {score.loss:.4f}")


def train(args: argparse.Namespace, given: dict, device: torch.device, arguments: list[str]) -> int:
    """Begin a run or go on with one, to its end or until it is stopped. Returns the exit status."""
    resumes = args.resume is not None
    run = resumed_run(args, given, device) if resumes else new_run(args, given, device, arguments)
    if run.rank == 0:
        config = run.model.config
        kind = "linear refinement" if config.linear else "refined" if config.refine else "plain ViT"
        print(f"model {run.recipe.model}: {kind}, {run.parameters:,} parameters, {config.img_size} px in "
              f"{config.grid**2} patches", flush=True)
    status = fit(run, go_on=records.command_line(arguments if resumes else [*arguments, "--resume"]))
    if status == 0 and run.rank == 0:
        finish(run, arguments)
    return status


def main(arguments=None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args, given = parse(arguments)
    device = hardware.choose_device(args.device)
    with distributed.process_group(device):
        try:
            if args.eval:
                evaluate_weights(args, given, device)
                return 0
            return train(args, given, device, arguments)
        except torch.OutOfMemoryError:
            raise UserError("the GPU's memory is too small: try a smaller --batch-size or --img-size") from None


if __name__ == "__main__":
    run_command(main)
