import torch


def parameters(heads, ratio, kernel):
    expanded = ratio * heads
    return 2 * heads * expanded + expanded * kernel**2 + 4 * expanded + 4 * heads


RIGHT = {
    "expand": [lambda maps, weight: torch.einsum("eh,bhij->beij", weight, maps)],
    "parameters": [parameters],
    "collapse": [lambda expansion, reduction: reduction @ expansion],
}
WRONG = [
    ("expand", lambda maps, weight: torch.einsum("eh,bhij->beji", weight, maps), "changed places"),
    ("expand", lambda maps, weight: torch.einsum("eh,bhij->beij", weight.softmax(1), maps), "free numbers"),
    ("parameters", lambda h, r, k: 2 * r * h * h + r * h * k**2, "the BatchNorms are missing"),
    ("parameters", lambda h, r, k: parameters(h, r, k) - 2 * h, "after the skip is missing"),
    ("collapse", lambda expansion, reduction: (reduction @ expansion).T, "transposed"),
    ("collapse", lambda expansion, reduction: expansion @ reduction, "what is applied first stands on the right"),
    ("collapse", lambda expansion, reduction: expansion.T + reduction, "the two are added"),
    ("collapse", lambda expansion, reduction: expansion, "the shape .8, 4., not .4, 4."),
]
