"""A task that plain attention does not learn in one block: name the symbol to the right of one that is shown.

    row:   a class token that shows one of 16 symbols, and the 16 in random order, of 20     answer: its right neighbour
Attention can look for the symbol that is shown, but that symbol's token does not know its neighbour; only a map that is
convolved along the row hands the look on by one place; or a second block, once the first has told each token what
stands before it. Ours. python -m refiner_min.neighbour records all of RUNS: neighbour.csv, a row a run, and
neighbour.json, how and where it was made. It imports model, hardware, records and stopping.
"""

import argparse
import csv
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from refiner_min import UserError, hardware, run_command, seed_for, write_json
from refiner_min.model import Block, RefinerConfig
from refiner_min.records import gone_on_with, origin, recorded
from refiner_min.stopping import claim

SYMBOLS, SIDE = 20, 4  # the row is as long as a grid of SIDE x SIDE is when it is flattened
LENGTH = SIDE * SIDE
BATCH, PEAK_LR, SHORT, LONG, LOOK_EVERY, TESTED = 128, 3e-3, 300, 3000, 20, 1000
VARIANTS = {  # name: what NeighbourNet is given; every block refines its own map
    "plain": dict(refine=False),
    "expansion": dict(kernel_size=1),
    "convolution": dict(expand=1),
    "linear": dict(linear=True),
    "refined": {},
    "faint-places": dict(refine=False, places=0.02),  # plain; a ViT's places begin so, but beside a stem's tokens
}
FORMS = [name for name in VARIANTS if name != "faint-places"]
RUNS = [  # task, variant, blocks, steps
    *(("right", name, 1, SHORT) for name in FORMS),
    *(("below", name, 1, SHORT) for name in FORMS),
    *(("right", name, blocks, LONG) for blocks in (1, 2, 3) for name in FORMS),
    *(("right", "faint-places", blocks, LONG) for blocks in (2, 3)),  # where plain attention needs its places
]
SEEDS = 5


class NeighbourNet(nn.Module):
    """Blocks of the package between an embedding and a head: symbols (B, N), the class token's first -> logits (B, K).
    places: the deviation that their vectors begin with, a symbol's begin with 1; fields: of RefinerConfig."""

    def __init__(self, blocks: int = 1, places: float = 1.0, **fields):
        super().__init__()
        self.config = RefinerConfig(img_size=2 * SIDE, patch_size=2, num_classes=SYMBOLS, dim=64, depth=blocks, heads=4,
                                    layer_scale=1.0, share=False, dense=False, **fields)
        self.symbols = nn.Embedding(SYMBOLS, self.config.dim)
        self.position = nn.Parameter(places * torch.randn(1, 1 + LENGTH, self.config.dim))
        self.blocks = nn.ModuleList(Block(self.config, index) for index in range(blocks))
        self.norm = nn.LayerNorm(self.config.dim)
        self.head = nn.Linear(self.config.dim, SYMBOLS)

    def forward(self, symbols):
        x, handed = self.symbols(symbols) + self.position, None  # (B, N, C)
        for block in self.blocks:
            x, handed = block(x, handed)
        return self.head(self.norm(x)[:, 0])


def draw(count: int, task: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Symbols (count, 1 + 16), first the one that is shown, and answers (count,): the symbol to its "right" in the row,
    or "below" it on the grid. One that has no such neighbour is never shown, so that chance is 1 in 15, or 1 in 12."""
    away = {"right": 1, "below": SIDE}[task]
    row = torch.rand(count, SYMBOLS).argsort(dim=1)[:, :LENGTH]
    shown = torch.randint(LENGTH - away, (count, 1))
    return torch.cat([row.gather(1, shown), row], dim=1), row.gather(1, shown + away)[:, 0]


@torch.no_grad()
def accuracy(net: NeighbourNet, task: str, seed: int) -> float:
    """Over rows that are the same for every net, drawn from another stream than those that are trained on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for("tested neighbours", seed))
        symbols, answers = draw(TESTED, task)
    right = (net.eval()(symbols).argmax(dim=1) == answers).float().mean().item()
    net.train()
    return right


def train(net: NeighbourNet, task: str = "right", seed: int = 0, steps: int = SHORT, until: float = 2.0):
    """AdamW with one cycle of the learning rate; yields (step, accuracy) every LOOK_EVERY steps, and ends at an
    accuracy of until."""
    torch.manual_seed(seed_for("neighbours", seed))
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_LR)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    for step in range(1, steps + 1):
        symbols, answers = draw(BATCH, task)
        loss = F.cross_entropy(net.train()(symbols), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % LOOK_EVERY == 0:
            reached = accuracy(net, task, seed=0)
            yield step, reached
            if reached >= until:
                return


def make(variant: str, blocks: int = 1, seed: int = 0) -> NeighbourNet:
    """The net of a variant, from its seed."""
    torch.manual_seed(seed)
    return NeighbourNet(blocks, **VARIANTS[variant])


def run(task: str, variant: str, blocks: int, steps: int, seed: int) -> dict:
    """A row of neighbour.csv. The long runs end at 99 %: what is asked is how many steps that takes."""
    started, curve = time.perf_counter(), list(train(make(variant, blocks, seed), task, seed, steps,
                                                     until=0.99 if steps == LONG else 2.0))
    reached = next((step for step, value in curve if value >= 0.99), "")
    return {"task": task, "variant": variant, "blocks": blocks, "steps": steps, "seed": seed, "accuracy": curve[-1][1],
            "steps_to_99": reached, "seconds": round(time.perf_counter() - started, 1)}


# ----------------------------------------------------------------------------------------------------------------------
# The command


def rows_of(path: Path) -> set[tuple]:
    """The task, variant, blocks, steps and seed of each row that is there. UserError: it holds something else."""
    if not path.exists():
        return set()
    try:
        with open(path) as file:
            return {(row["task"], row["variant"], row["blocks"], row["steps"], row["seed"])
                    for row in csv.DictReader(file)}
    except (KeyError, ValueError, csv.Error):
        raise UserError(f"{path} was not written by this command: move it away, or name another --out") from None


def record(out: Path):
    """All of RUNS, each with every seed; what stands in neighbour.csv already is not run again. Where rows were made
    stands in neighbour.json, as config.json says it of a run. UserError: it cannot be read or written."""
    path, facts, here = out / "neighbour.csv", out / "neighbour.json", origin(hardware.choose_device("cpu"))
    done = rows_of(path)
    missing = [(*wanted, seed) for wanted in RUNS for seed in range(SEEDS) if (*map(str, (*wanted, seed)),) not in done]
    if missing:
        made = recorded(facts) or {"command": "python -m refiner_min.neighbour", **here}
        write_json(facts, gone_on_with(made, here, rows=len(done)))
    with open(path, "a", newline="") as file:
        for wanted in missing:
            row = run(*wanted)
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m refiner_min.neighbour", description="What one refined block does "
                                     "on the task of neighbours, and how many plain ones it takes.")
    parser.add_argument("--out", metavar="DIR", default="runs/neighbour", help="default: runs/neighbour")
    out = Path(parser.parse_args(arguments).out)
    try:
        with claim(out):
            record(out)
    except OSError as error:
        raise UserError(f"--out {out}: the record cannot be read or written ({error})") from None
    return 0


if __name__ == "__main__":
    run_command(main)
