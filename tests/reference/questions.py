"""A policy of some 96 weights, groups of ragged traces, and SSR algorithm 2's units planned with numpy.

The policy is a function of a dict of tensors, so that the optimizer under test and a reference that holds numpy
arrays compute their gradients with the same operations.
"""

import math

import numpy as np
import torch

# "embed" is tied: it is read at the input and at the output. "late" gets a gradient from later steps only,
# "unused" never. "none" has no coordinates.
SHAPES = {"embed": (9, 5), "mix": (5, 5), "gain": (5,), "late": (4, 5), "scale": (), "unused": (3,), "none": (0, 4)}
ADVANTAGES = (None, 0.0, 0.4, 0.5, -1.0, 1.5)


def weights(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def questions(seed, count):
    """Each a group of three responses with 0 to 5 steps: (tokens [step] by response, advantages by response).

    One in eight has no signal at all.
    """
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        lengths = rng.integers(0, 6, size=3)
        tokens = [rng.integers(0, 9, size=(length, 4)) for length in lengths]
        known = 2 if rng.random() < 0.125 else len(ADVANTAGES)
        made.append((tokens, [[ADVANTAGES[place] for place in rng.integers(0, known, size=n)] for n in lengths]))
    return made


def unit_loss(theta, question, steps):
    """Sum of -A log p(token | token before) over the responses' tokens in these steps."""
    tokens, advantages = question
    loss = theta["scale"] * 0.0
    for response, row in zip(tokens, advantages, strict=True):
        for step in steps:
            if step >= len(row) or not row[step]:
                continue
            before, after = torch.from_numpy(response[step][:-1]), torch.from_numpy(response[step][1:])
            hidden = torch.tanh(theta["embed"][before] @ theta["mix"]) * theta["gain"]
            if step >= 2:
                hidden = hidden + theta["late"][before % 4]
            logits = theta["scale"] * (hidden @ theta["embed"].T)
            loss = loss - row[step] * logits.log_softmax(-1)[range(3), after].mean()
    return loss


def gradients_at(arrays, question, steps):
    """Gradients of ``unit_loss`` by name, as numpy arrays; weights that it does not read are left out."""
    theta = {name: torch.tensor(array).requires_grad_() for name, array in arrays.items()}
    found = torch.autograd.grad(unit_loss(theta, question, steps), list(theta.values()), allow_unused=True)
    return {name: gradient.numpy() for name, gradient in zip(theta, found, strict=True) if gradient is not None}


def units_of(question, curve, *, budget, max_step_budget, tolerance, num_unprotected):
    """(steps, k) of the units with signal: steps fused while no advantage changes by ``tolerance`` or more."""
    _, advantages = question
    longest = max(map(len, advantages))
    table = np.zeros((len(advantages), longest))
    for place, row in enumerate(advantages):
        table[place, : len(row)] = [a or 0.0 for a in row]
    mass = np.array([curve[min(i, len(curve) - 1)] for i in range(longest)]) + 1e-8
    shares = np.minimum(max_step_budget, budget * (1 / mass) / (1 / mass).sum())
    jumps = np.abs(np.diff(table, axis=1)).max(0, initial=0.0)
    groups = np.split(np.arange(longest), np.flatnonzero(jumps >= tolerance) + 1)
    return [
        (group.tolist(), math.floor(shares[group].sum() * num_unprotected)) for group in groups if table[:, group].any()
    ]
