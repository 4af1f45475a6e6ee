import torch
import torch.nn.functional as F


def similarity(maps):
    unit = F.normalize(maps.flatten(2), dim=2)
    cosines, heads = unit @ unit.transpose(1, 2), maps.shape[1]
    return (cosines.sum(dim=(1, 2)) - heads).mean() / (heads * (heads - 1))


RIGHT = {
    "attention": [lambda q, k, v: (q @ k.T / q.shape[1] ** 0.5).softmax(dim=1) @ v],
    "split_heads": [lambda x, heads: x.unflatten(2, (heads, -1)).transpose(1, 2)],
    "map_similarity": [similarity],
}
WRONG = [
    ("attention", lambda q, k, v: (q @ k.T).softmax(dim=1) @ v, "not divided by the root"),
    ("attention", lambda q, k, v: (q @ k.T / 2).softmax(dim=0) @ v, "runs over the queries"),
    ("attention", lambda q, k, v: q @ k.T / 2 @ v, "there is no softmax"),
    ("attention", lambda q, k, v: v > 0, "its numbers differ"),
    ("split_heads", lambda x, heads: x.reshape(len(x), heads, x.shape[1], -1), "a reshape straight to"),
    ("split_heads", lambda x, heads: x.unflatten(2, (-1, heads)).permute(0, 3, 1, 2), "split C into .H, C/H."),
    ("split_heads", lambda x, heads: x, "the shape .2, 5, 12., not .2, 3, 5, 4."),
    ("split_heads", lambda x, heads: None, "does it end with a return"),
    ("split_heads", lambda x, heads: 3, "returned 3, not a tensor"),
    ("map_similarity", lambda maps: (F.normalize(maps.flatten(2), dim=2) @ F.normalize(
        maps.flatten(2), dim=2).transpose(1, 2)).mean(), "compared with itself"),
    ("map_similarity", lambda maps: torch.tensor(0.5), "its numbers differ"),
]
