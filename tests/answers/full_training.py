import math


def schedule(step, warmup, total):
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * step / total)) / 2


RIGHT = {
    "schedule": [schedule],
    "average": [lambda old, weights, decay: decay * old + (1 - decay) * weights,
                lambda old, weights, decay: old.mul_(decay).add_(weights, alpha=1 - decay)],
    "drop_rates": [lambda depth, last: [last * index / (depth - 1) for index in range(depth)]],
}
WRONG = [
    ("schedule", lambda step, warmup, total: (step + 1) / (warmup + 1) if step < warmup else schedule(
        step, warmup, total), "the warm-up begins at 0"),
    ("schedule", lambda step, warmup, total: step / warmup if step < warmup else (
        1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2, "not from the end of the warm-up"),
    ("schedule", lambda step, warmup, total: (1 + math.cos(math.pi * step / total)) / 2, "no warm-up"),
    ("average", lambda old, weights, decay: (1 - decay) * old + decay * weights, "changed places"),
    ("average", lambda old, weights, decay: (old + weights) / 2, "a plain mean"),
    ("drop_rates", lambda depth, last: last, "not a list of rates"),
    ("drop_rates", lambda depth, last: [last] * depth, "every block has the same rate"),
    ("drop_rates", lambda depth, last: [last * index / depth for index in range(depth)], "does not reach the rate"),
]
