"""What others may have written: files of torch.save, and facts of JSON or of such a file, held to a schema.

Everything that is read from a file passes here once, and is trusted from then on. What is wrong is a ValueError that
names the part, for the sentence of the room that reads. It imports no other room.
"""

import math
import os
import zipfile
from types import UnionType
from typing import get_args, get_origin

import torch

NUMBERS = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16,
           torch.int32, torch.int64, torch.bool}  # the formats of tensors that are taken from a file


# ----------------------------------------------------------------------------------------------------------------------
# Files of torch.save


def read_torch(path, map_location="cpu", allowed=()):
    """What torch.save wrote, weights_only: it runs no code and is no larger in memory than on the disk. allowed:
    classes that it may hold beside tensors and Python's own. ValueError, or what torch and zipfile raise: it is
    damaged, or no such file."""
    size = os.path.getsize(path)
    if not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError("it is no file")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if sum(part.file_size for part in file.infolist()) > size:
                raise ValueError("its parts are larger than the file")
            if part := file.testzip():  # torch looks at no checksum
                raise ValueError(f"{part} does not match its checksum")
    with torch.serialization.safe_globals(list(allowed)):
        content = torch.load(path, map_location=map_location, weights_only=True)
    _check_tensors(content, size)
    return content


def _check_tensors(content, size: int):
    """ValueError unless every tensor is of plain numbers, and no larger than the file of so many bytes: an expanded
    view of one number may be of any size. A container may hold itself."""
    seen, rest = set(), [("it", content)]
    while rest:
        name, value = rest.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            rest += [(key if isinstance(key, str) else name, part) for key, part in value.items()]
        elif isinstance(value, (list, tuple, set)):
            rest += [(name, part) for part in value]
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.dtype not in NUMBERS or value.is_meta or value.is_nested:
                raise ValueError(f"{name} is no tensor of plain numbers")
            if value.numel() * value.element_size() > size:
                raise ValueError(f"{name} is a tensor that is larger than the file")


# ----------------------------------------------------------------------------------------------------------------------
# Schemas


def is_a(value, kind) -> bool:
    """Whether a value is of a kind, written as in a type hint: int, float, str | None, list[str], dict[str, int],
    tuple[int, int]. Numbers are finite and fit into 64 bits; an int is a float, too, a bool neither."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(is_a(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(is_a(item, *parts) for item in value)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(is_a, value, parts))
    if origin is dict:
        return isinstance(value, dict) and all(is_a(part, parts[0]) for part in value) and all(
            is_a(part, parts[1]) for part in value.values())
    if kind is int:
        return type(value) is int and -2**63 <= value < 2**63
    if kind is float:
        return is_a(value, int) or type(value) is float and math.isfinite(value)
    return isinstance(value, kind)


def check_fields(facts, fields: dict, needed=()):
    """fields: {name: kind} as is_a's, of those that facts may hold; needed: the names of those that it must hold.
    ValueError naming the first that is missing or of another kind."""
    if not isinstance(facts, dict):
        raise ValueError(f"it holds a {type(facts).__name__} in the place of fields")
    for name, kind in fields.items():
        if name not in facts:
            if name in needed:
                raise ValueError(f"its field {name} is missing")
        elif not is_a(facts[name], kind):
            raise ValueError(f"its field {name} is no {kind.__name__ if isinstance(kind, type) else kind}")


def check_alike(there, here, name: str):
    """ValueError naming the first place where what a file holds differs in names, types, shapes or number formats from
    what stands here: nested dicts of tensors and numbers."""
    if isinstance(here, dict):
        if not isinstance(there, dict) or there.keys() != here.keys():
            other = there.keys() ^ here.keys() if isinstance(there, dict) else ()
            named = next((f"{name}.{key}" for key in other if isinstance(key, (str, int))), name)
            raise ValueError(f"{named} is there or here only")
        for key, value in here.items():
            check_alike(there[key], value, f"{name}.{key}")
    elif isinstance(here, torch.Tensor):
        if not isinstance(there, torch.Tensor):
            raise ValueError(f"{name} is no tensor")
        if (there.shape, there.dtype) != (here.shape, here.dtype):
            raise ValueError(f"{name} is {tuple(there.shape)} {there.dtype} there, {tuple(here.shape)} {here.dtype} "
                             f"here")
    elif not is_a(there, type(here)):
        raise ValueError(f"{name} is no {type(here).__name__}")
