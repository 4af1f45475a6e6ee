"""What a notebook has built and later ones use again, line for line: training on digits and linear CKA (notebook 1),
what a token gives to the patches (notebook 2); the photographs; and how a class is built method by method. It imports
pictures, augment and hardware."""

from pathlib import Path

import torch
import torch.nn.functional as F

from refiner_min.augment import evaluation_picture, normalise
from refiner_min.hardware import choose_device
from refiner_min.pictures import read_picture


def part_of(cls):
    """A decorator that makes a function a method of cls, in the place of one of that name, and gives the function back:
    a class can be built in as many cells as it has methods."""
    def add(function):
        setattr(cls, function.__name__, function)
        return function

    return add


def train(network, digits, epochs=10, batch_size=48, lr=2e-3):
    """Train on the digits; the validation accuracy after each epoch, in percent. network: images to logits (B, K)."""
    device = choose_device(None)  # a GPU if there is one
    network.to(device)
    images, labels = normalise(digits.train.pictures).to(device), digits.train.labels.to(device)
    val_images, val_labels = normalise(digits.val.pictures).to(device), digits.val.labels.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * (len(labels) // batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    accuracies = []
    for _ in range(epochs):
        network.train()
        for batch in torch.randperm(len(labels))[: steps // epochs * batch_size].split(batch_size):
            loss = F.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        with torch.no_grad():
            right = network.eval()(val_images).argmax(dim=1) == val_labels
        accuracies.append(100 * right.float().mean().item())
    network.cpu()
    return accuracies


def linear_cka(x, y):
    """Features (n, C) and (n, D) of the same n tokens -> their similarity, from 0 to 1 (arXiv:1905.00414)."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    return ((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def photographs(size=64):
    """The photographs beside the notebooks, which run in their folder, as a model of that size takes them: (3, 3, S, S)
    from -1 to 1, chelsea, china and flower."""
    paths = sorted(Path("photos").glob("*.jpg"))
    return torch.stack([normalise(evaluation_picture(read_picture(path), size)) for path in paths])


def looks(maps, photo, token=0):
    """(B, E, N, N) -> E maps (grid, grid): what a token of a photograph gives to the patches."""
    side = round((maps.shape[3] - 1) ** 0.5)
    return list(maps[photo, :, token, 1:].unflatten(1, (side, side)))
