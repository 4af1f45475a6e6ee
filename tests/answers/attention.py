import math

import torch
import torch.nn.functional as F

from refiner_min import measures, model


def embed(patches, class_token, position, behind=False):
    row = patches.flatten(2).transpose(1, 2)
    both = [class_token.expand(len(row), -1, -1), row]
    return torch.cat(both[::-1] if behind else both, dim=1) + position


def embed_by_loops(patches, class_token, position):
    batch, channels, rows, columns = patches.shape
    out = torch.zeros(batch, rows * columns + 1, channels)
    out[:, 0] = class_token
    for row in range(rows):
        for column in range(columns):
            out[:, 1 + row * columns + column] = patches[:, :, row, column]
    out += position
    return out


def embed_changing_position(patches, class_token, position):
    position += 1
    return embed(patches, class_token, position - 1)


def attention(q, k, v, scale=None, dim=1):
    return (q @ k.T / (q.shape[1] ** 0.5 if scale is None else scale)).softmax(dim=dim) @ v


def attention_by_loops(q, k, v):
    out = torch.zeros_like(v)
    for i in range(len(q)):
        scores = [float(q[i] @ k[j]) / math.sqrt(q.shape[1]) for j in range(len(k))]
        total = sum(math.exp(score) for score in scores)
        for j in range(len(v)):
            out[i] += math.exp(scores[j]) / total * v[j]
    return out


def attention_in_place(q, k, v):
    scores = q @ k.T
    scores /= math.sqrt(k.shape[-1])
    scores -= scores.amax(dim=-1, keepdim=True)
    weights = scores.exp_()
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights @ v


def attention_changing_q(q, k, v):
    q /= q.shape[1] ** 0.5
    return (q @ k.T).softmax(dim=1) @ v


def attention_without_sum(q, k, v):
    return (q @ k.T / q.shape[1] ** 0.5).exp() @ v


def split(x, heads):
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def forward(self, x, heads=None, scale=None, dim=3, order=(0, 1, 2), after=1.0, turned=False):
    parts = self.qkv(x).chunk(3, dim=2)
    q, k, v = (split(parts[index], self.heads if heads is None else heads) for index in order)
    maps = (q @ k.transpose(2, 3) * (self.scale if scale is None else scale)).softmax(dim=dim) * after
    gathered = (maps.transpose(2, 3) if turned else maps) @ v
    return self.proj(gathered.transpose(1, 2).flatten(2)), maps


def forward_of_the_package(self, x):
    """model.Attention with the same weights."""
    config = model.RefinerConfig(dim=x.shape[2], heads=self.heads, refine=False)
    attention = model.Attention(config, own=True, refined=False)
    attention.load_state_dict(self.state_dict())
    return attention(x)[0], attention.maps(x).raw


def forward_by_torch(self, x):
    q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    gathered = F.scaled_dot_product_attention(q, k, v)
    maps = F.scaled_dot_product_attention(q, k, torch.eye(x.shape[1]).expand(*q.shape[:2], -1, -1))
    return [self.proj(gathered.permute(0, 2, 1, 3).reshape(x.shape)), maps]


def forward_published(self, x):
    q, k, v = (split(part, self.heads) for part in self.qkv(x).chunk(3, dim=2))
    q, k = q * self.scale**0.5, k * self.scale**0.5
    maps = (q @ k.transpose(-2, -1)).softmax(dim=-1)
    return self.proj((maps @ v).transpose(1, 2).flatten(2)), maps


def forward_merging(self, x, merge, project=True):
    _, maps = forward(self, x)
    gathered = maps @ split(self.qkv(x).chunk(3, dim=2)[2], self.heads)
    return self.proj(merge(gathered)) if project else merge(gathered), maps


def forward_by_heads_first(self, x):
    q, k, v = self.qkv(x).unflatten(2, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
    maps = (q @ k.transpose(2, 3) * self.scale).softmax(dim=3)
    return self.proj((maps @ v).transpose(1, 2).flatten(2)), maps


def forward_of_scores(self, x):
    q, k, v = (split(part, self.heads) for part in self.qkv(x).chunk(3, dim=2))
    maps = q @ k.transpose(2, 3) * self.scale
    return self.proj((maps @ v).transpose(1, 2).flatten(2)), maps


def forward_changing_x(self, x):
    found = forward(self, x)
    x *= 0
    return found


def forward_scaling_in_place(self, x):
    q, k, v = (split(part, self.heads) for part in self.qkv(x).chunk(3, dim=2))
    q *= self.scale
    maps = (q @ k.transpose(2, 3)).softmax(dim=3)
    return self.proj((maps @ v).transpose(1, 2).flatten(2)), maps


def forward_dividing_in_place(self, x):
    q, k, v = (split(part, self.heads) for part in self.qkv(x).chunk(3, dim=2))
    maps = (q @ k.transpose(2, 3) * self.scale).exp_()
    maps /= maps.sum(dim=3, keepdim=True)
    return self.proj((maps @ v).transpose(1, 2).flatten(2)), maps


def cosines(maps, centred=False):
    flat = maps.flatten(2)
    unit = F.normalize(flat - flat.mean(dim=2, keepdim=True) if centred else flat, dim=2)
    return unit @ unit.transpose(1, 2)


def similarity(maps, factor=1.0, **options):
    found, heads = cosines(maps, **options), maps.shape[1]
    return (found.sum(dim=(1, 2)) - found.diagonal(0, 1, 2).sum(dim=1)).mean() / (heads * (heads - 1)) * factor


def similarity_by_loops(maps):
    pairs = [F.cosine_similarity(picture[i].flatten(), picture[j].flatten(), dim=0).item()
             for picture in maps for i in range(len(picture)) for j in range(len(picture)) if i < j]
    return sum(pairs) / len(pairs)


def off_diagonal(maps):
    return cosines(maps)[:, ~torch.eye(maps.shape[1], dtype=torch.bool)]


def similarity_of_rows(maps):
    pairs = [F.cosine_similarity(maps[:, i], maps[:, j], dim=2).mean()
             for i in range(maps.shape[1]) for j in range(i)]
    return torch.stack(pairs).mean()


def unscaled(maps):
    products = maps.flatten(2) @ maps.flatten(2).transpose(1, 2)
    return products[:, ~torch.eye(maps.shape[1], dtype=torch.bool)].mean()


def similarity_changing_maps(maps):
    maps /= maps.flatten(2).norm(dim=2)[:, :, None, None]
    return similarity(maps)


RIGHT = {
    "embed": [
        embed, embed_by_loops,
        lambda patches, class_token, position: torch.cat([
            (class_token + position[:, :1]).repeat(len(patches), 1, 1),
            patches.permute(0, 2, 3, 1).reshape(len(patches), -1, patches.shape[1]) + position[:, 1:]], dim=1),
        lambda patches, class_token, position: embed(patches.double(), class_token.double(), position.double()),
        lambda patches, class_token, position: torch.einsum("bnc->bnc", embed(patches, class_token, position)),
    ],
    "attention": [
        attention, attention_by_loops, attention_in_place,
        lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None])[0],
        lambda q, k, v: torch.softmax(torch.einsum("id,jd->ij", q, k) * q.shape[-1] ** -0.5, -1) @ v,
        lambda q, k, v: (v.T @ (k @ q.T / q.shape[1] ** 0.5).softmax(dim=0)).T,
        lambda q, k, v: attention(q.double(), k.double(), v.double()),
    ],
    "split_heads": [
        split,
        lambda x, heads: x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).permute(0, 2, 1, 3),
        lambda x, heads: torch.stack(x.chunk(heads, dim=2), dim=1),
        lambda x, heads: torch.stack([x[:, :, i * x.shape[2] // heads:(i + 1) * x.shape[2] // heads]
                                      for i in range(heads)], dim=1),
        lambda x, heads: torch.cat([part[:, None] for part in x.tensor_split(heads, dim=2)], dim=1),
    ],
    "attention_forward": [forward, forward_of_the_package, forward_by_torch, forward_published,
                          lambda self, x: tuple(found.double() for found in forward(self, x))],
    "map_similarity": [
        similarity, similarity_by_loops, measures.head_similarity,
        lambda maps: off_diagonal(maps).mean().item(),
        lambda maps: off_diagonal(maps).mean().reshape(1),
        lambda maps: off_diagonal(maps).mean().reshape(1, 1),
        lambda maps: off_diagonal(maps.double()).mean(),
        lambda maps: cosines(maps).triu(1).sum() / (len(maps) * maps.shape[1] * (maps.shape[1] - 1) / 2),
    ],
}
WRONG = [
    ("embed", lambda patches, class_token, position: embed(patches, class_token, 0 * position), "not added"),
    ("embed", lambda patches, class_token, position: torch.cat([
        class_token.expand(len(patches), -1, -1), embed(patches, class_token, position)[:, 1:]], dim=1),
     "the class token has no position"),
    ("embed", lambda patches, class_token, position: torch.cat([
        class_token.expand(len(patches), -1, -1), embed(patches, class_token, 0 * position)[:, 1:]
        + position[:, :-1]], dim=1), "shifted by one"),
    ("embed", lambda patches, class_token, position: embed(patches, class_token, position[:, :1]), "the same position"),
    ("embed", lambda patches, class_token, position: embed(patches, class_token, position, behind=True),
     "behind the patches"),
    ("embed", lambda patches, class_token, position: embed(patches.transpose(2, 3), class_token, position),
     "in order of columns"),
    ("embed", lambda patches, class_token, position: torch.cat([
        class_token.expand(len(patches), -1, -1), patches.reshape(len(patches), -1, patches.shape[1])], dim=1)
        + position, "a transpose, not a reshape"),
    ("embed", lambda patches, class_token, position: embed(patches, class_token, position)[:, 1:],
     "the class token is missing"),
    ("embed", lambda patches, class_token, position: patches.flatten(2).transpose(1, 2) + class_token
     + position[:, 1:], "added to every patch"),
    ("embed", lambda patches, class_token, position: embed(patches, class_token, position).transpose(1, 2),
     "tokens and channels have changed places"),
    ("embed", lambda patches, class_token, position: embed(patches, class_token, 0) * position, "multiplied"),
    ("embed", embed_changing_position, "in place"),
    ("embed", lambda patches, class_token, position: position, "the shape .1, 10, 5., not .2, 10, 5."),
    ("embed", lambda patches, class_token, position: None, "does it end with a return"),
    ("embed", lambda patches, class_token, position: [patches, class_token], "a list of 2, not one tensor"),
    ("embed", lambda patches, class_token, position: torch.zeros(2, 10, 5), "its numbers differ"),
    ("attention", lambda q, k, v: attention(q, k, v, scale=1), "not divided by the root of the number of channels"),
    ("attention", lambda q, k, v: attention(q, k, v, scale=q.shape[1]), "number of channels, not by its root"),
    ("attention", lambda q, k, v: attention(q, k, v, scale=q.shape[1] ** -0.5), "multiplied by the root"),
    ("attention", lambda q, k, v: attention(q, k, v, scale=len(q) ** 0.5), "the root of the number of tokens, N"),
    ("attention", lambda q, k, v: attention(q, k, v, scale=len(q)), "the number of tokens; it is by the root"),
    ("attention", lambda q, k, v: attention(q, k, v, scale=1) / q.shape[1] ** 0.5, "the scale comes after the softmax"),
    ("attention", lambda q, k, v: attention(q, k, v, dim=0), "runs over the queries"),
    ("attention", lambda q, k, v: attention(k, q, v), "queries and keys have changed places"),
    ("attention", lambda q, k, v: (q @ k.T / q.shape[1] ** 0.5).softmax(dim=1).T @ v, "A.T @ v"),
    ("attention", lambda q, k, v: q @ k.T / q.shape[1] ** 0.5 @ v, "there is no softmax"),
    ("attention", lambda q, k, v: q @ k.T @ v, "neither scale nor softmax"),
    ("attention", lambda q, k, v: attention(q, k, k), "gather the keys"),
    ("attention", lambda q, k, v: attention(q, q, v), "the keys are not used"),
    ("attention", lambda q, k, v: (q @ k.T / q.shape[1] ** 0.5).softmax(dim=1), "it has still to gather the values"),
    ("attention", lambda q, k, v: v.mean(dim=0).expand(len(q), -1), "the plain mean"),
    ("attention", attention_without_sum, "not divided by their sum"),
    ("attention", attention_changing_q, "in place"),
    ("attention", lambda q, k, v: attention(q, k, v, scale=2), "its numbers differ"),
    ("attention", lambda q, k, v: v > 0, "its numbers differ"),
    ("attention", lambda q, k, v: attention(q, k, v)[0], "the shape .4,., not .5, 4."),
    ("split_heads", lambda x, heads: x.reshape(len(x), heads, x.shape[1], -1), "a reshape straight to"),
    ("split_heads", lambda x, heads: x.unflatten(2, (-1, heads)).permute(0, 3, 1, 2), "split C into .H, C/H."),
    ("split_heads", lambda x, heads: x.unflatten(2, (heads, -1)), "the heads stand behind the tokens"),
    ("split_heads", lambda x, heads: torch.stack(x.chunk(heads, dim=2)), "in front of the batch"),
    ("split_heads", lambda x, heads: split(x, heads).transpose(2, 3), "tokens and channels of a head"),
    ("split_heads", lambda x, heads: torch.stack([x[:, :, :x.shape[2] // heads]] * heads, dim=1), "are repeated"),
    ("split_heads", lambda x, heads: x.chunk(heads, dim=2), "a tuple of 3, not one tensor"),
    ("split_heads", lambda x, heads: list(x.chunk(heads, dim=2)), "a list of 3, not one tensor"),
    ("split_heads", lambda x, heads: split(x.mul_(1.5), heads), "in place"),
    ("split_heads", lambda x, heads: split(x, x.shape[2] // 4), "the shape .3, 2, 7, 5."),
    ("split_heads", lambda x, heads: x, "the shape .2, 5, 12., not .2, 3, 5, 4."),
    ("split_heads", lambda x, heads: None, "does it end with a return"),
    ("split_heads", lambda x, heads: 3, "returned 3, not one tensor"),
    ("attention_forward", lambda self, x: forward(self, x, scale=1), "the scores are not scaled"),
    ("attention_forward", lambda self, x: forward(self, x, scale=self.scale**2), "takes the scale's root"),
    ("attention_forward", lambda self, x: forward(self, x, scale=1 / self.scale), "are divided by the scale"),
    ("attention_forward", lambda self, x: forward(self, x, scale=x.shape[2] ** -0.5), "that of all C channels"),
    ("attention_forward", lambda self, x: forward(self, x, scale=1, after=self.scale), "the scale comes after"),
    ("attention_forward", lambda self, x: forward(self, x, dim=2), "runs over the queries"),
    ("attention_forward", lambda self, x: forward(self, x, dim=1), "its numbers differ"),
    ("attention_forward", lambda self, x: forward(self, x, order=(1, 0, 2)), "queries and keys have changed places"),
    ("attention_forward", lambda self, x: forward(self, x, order=(1, 2, 0)), "here v comes first"),
    ("attention_forward", forward_by_heads_first, "they are split into heads first"),
    ("attention_forward", lambda self, x: forward(self, x, turned=True), "transposed when they gather"),
    ("attention_forward", forward_of_scores, "there is no softmax"),
    ("attention_forward", lambda self, x: forward(self, x, heads=1), "the shape .3, 1, 5, 5."),
    ("attention_forward", lambda self, x: (forward(self, x)[0], forward(self, x)[1].mean(dim=1)), "averaged over"),
    ("attention_forward", lambda self, x: forward_merging(
        self, x, lambda gathered: gathered.transpose(1, 2).flatten(2), project=False), "self.proj, is missing"),
    ("attention_forward", lambda self, x: forward_merging(self, x, lambda gathered: gathered.reshape(x.shape)),
     "are not put side by side"),
    ("attention_forward", lambda self, x: forward_merging(self, x, lambda gathered: gathered.permute(
        0, 2, 3, 1).flatten(2)), "interleaved"),
    ("attention_forward", lambda self, x: (x + forward(self, x)[0], forward(self, x)[1]), "that is the block's work"),
    ("attention_forward", lambda self, x: forward(self, x)[0], "return two things"),
    ("attention_forward", lambda self, x: forward(self, x)[::-1], "the tokens are returned first"),
    ("attention_forward", lambda self, x: None, "does it end with a return"),
    ("attention_forward", lambda self, x: (None, None), "returned None, not one tensor"),
    ("attention_forward", forward_changing_x, "in place"),
    ("attention_forward", lambda self, x: [part.detach() for part in forward(self, x)], "no gradient comes through"),
    ("attention_forward", forward_scaling_in_place, "in place that the backward pass needs"),
    ("attention_forward", forward_dividing_in_place, "in place that the backward pass needs"),
    ("map_similarity", lambda maps: cosines(maps).mean(), "compared with itself"),
    ("map_similarity", lambda maps: similarity(maps, factor=1 - 1 / maps.shape[1]), "not H . H"),
    ("map_similarity", lambda maps: similarity(maps, factor=0.5), "counts it twice"),
    ("map_similarity", lambda maps: off_diagonal(maps).sum() / len(maps), "the sum over the pairs"),
    ("map_similarity", lambda maps: off_diagonal(maps).sum(), "the sum over pictures and pairs"),
    ("map_similarity", lambda maps: off_diagonal(maps[:1]).mean(), "only the first picture"),
    ("map_similarity", lambda maps: off_diagonal(maps[:, :2]).mean(), "only the first two heads"),
    ("map_similarity", lambda maps: F.cosine_similarity(maps[:, 1:].flatten(2), maps[:, :-1].flatten(2), dim=2).mean(),
     "only neighbouring heads"),
    ("map_similarity", lambda maps: off_diagonal(maps[None]).mean(), "whole pictures are compared"),
    ("map_similarity", unscaled, "scaled to length one"),
    ("map_similarity", similarity_of_rows, "row is compared with row"),
    ("map_similarity", lambda maps: similarity(maps, centred=True), "the mean is taken off"),
    ("map_similarity", lambda maps: off_diagonal(maps).abs().mean(), "the signs are gone"),
    ("map_similarity", lambda maps: off_diagonal(maps).mean(dim=1), "a number for each picture"),
    ("map_similarity", cosines, "the shape .3, 4, 4., not a number"),
    ("map_similarity", lambda maps: "0.5", "a str of 3, not a number"),
    ("map_similarity", similarity_changing_maps, "in place"),
    ("map_similarity", lambda maps: torch.tensor(0.5), "its numbers differ"),
    ("map_similarity", lambda maps: 1, "its numbers differ"),
]
