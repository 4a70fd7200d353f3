"""The shares of a training step's time, from counts: where more devices, another network or another setting would help.

The unit is that of ``step_gradients.cost``: one token's forward pass through the model's body. Passes and sampling come from
its formulas. The rest moves bytes, and a byte of memory costs what the cost model's read of the weights does. Responses are
taken as long as they may get, all in steps of one length; a critic's server is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssrctl.configs import TrainConfig
from ssrctl.distributed.dealing import teams
from ssrctl.training.step_gradients.chunks import cache_obstacle
from ssrctl.training.step_gradients.cost import COSTS, DEVICE_COSTS, ModelCosts, body_parameters
from ssrctl.training.step_gradients.shape import GroupShape, UnitSpan


@dataclass(frozen=True)
class MovingCosts:
    """What a device moves, in bytes of memory read in the same time.

    Attributes:
        itemsize: bytes of a weight in the cost model's read of the weights.
        reads: reads of a unit's gradient that its claim takes.
        kept: bytes for a kept coordinate that is added to the update and applied.
        packed: bytes for a kept coordinate that is packed, sent and unpacked, without the network.
        dense: bytes for a weight that AdamW updates.
        wire: bytes of memory for a byte on the network.
    """

    itemsize: int
    reads: float
    kept: float
    packed: float
    dense: float
    wire: float


# cpu: from docs/benchmarks.md, 2 cores and the loopback device: 0.36 s for a claim of 135M float32 weights, 1.14 s to add and
# apply 6.7M coordinates, 1.97 s to exchange 26.9M, 0.53 s for 257 MiB of a dense all-reduce, at 7.5 GB/s.
# cuda: not measured; arithmetic with 2e12 bytes/s of memory and 25e9 of network.
MOVING_COSTS = {
    "cpu": MovingCosts(itemsize=4, reads=3.0, kept=1200.0, packed=500.0, dense=60.0, wire=15.0),
    "cuda": MovingCosts(itemsize=2, reads=2.0, kept=200.0, packed=100.0, dense=30.0, wire=80.0),
}


def num_units(config: TrainConfig) -> int:
    """Return the units of a question that plans count with: as many as share the budget at most k_max each."""
    if config.optimizer != "kronos" or config.credit != "step" or config.allocation == "pooled":
        return 1
    units = math.ceil(config.budget / config.max_step_budget - 1e-9) if config.max_step_budget < config.budget else 1
    return min(units, config.max_units or units)


def time_shares(
    config: TrainConfig, model: Any, prompt_tokens: int, *, device: str, itemsize: int, processes: int, sent: float
) -> dict[str, float]:
    """Return the parts of a step's time in the process that has most to do, as shares that sum to 1.

    Args:
        config: the run's settings.
        model: built from its config, on any device.
        prompt_tokens: tokens of a prompt.
        device: type of the device that trains; an unknown one counts as ``cuda``.
        itemsize: bytes of a weight.
        processes: number of them.
        sent: bytes that a process sends per step.
    """
    costs = ModelCosts.of(model, device=device)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    moving = MOVING_COSTS.get(device, MOVING_COSTS["cuda"])
    read = DEVICE_COSTS.get(device, DEVICE_COSTS["cuda"]).forward_weights
    per_byte = read / (body_parameters(model) * moving.itemsize)
    sharded = config.sharding != "none" and processes > 1
    # the processes that share a question, of the teams with fewer of them, and each state
    team = processes if sharded else len(teams(config.questions_per_step, processes)[-1])
    holders = processes if sharded else 1
    sampled = math.ceil(config.questions_per_step / processes)
    learned = config.questions_per_step if sharded else sampled
    rows = math.ceil(config.num_generations / team)
    parts = {
        "sampling": _sampling(config, costs, prompt_tokens, sampled, config.num_generations if sharded else rows),
        "passes": learned * _passes(config, costs, prompt_tokens, rows, chunks=cache_obstacle(model) is None),
    }
    kept = config.questions_per_step * config.budget * count
    if config.optimizer == "kronos":
        parts["selection"] = learned * num_units(config) * moving.reads * count * itemsize / team * per_byte
        parts["update"] = kept * moving.kept / holders * per_byte
    else:
        parts["update"] = count * moving.dense / holders * per_byte
    if processes > 1:
        packed = kept * moving.packed if config.optimizer == "kronos" and not sharded else 0.0
        parts["exchange"] = (packed + sent * moving.wire) * per_byte
    for name in parts.keys() - {"sampling"}:
        parts[name] *= config.num_iterations
    return _shares(parts)


def _shares(parts: Mapping[str, float]) -> dict[str, float]:
    total = sum(parts.values())
    return {name: part / total for name, part in parts.items()}


def _sampling(config: TrainConfig, costs: ModelCosts, prompt: int, questions: int, rows: int) -> float:
    """Return the cost of sampling ``rows`` responses to each of ``questions``, a token of all rows at a time."""
    together = 1 if config.sample_together == "question" else questions
    width = min(config.sampling_batch_size, together * rows)
    batches = questions / together * math.ceil(together * rows / width)
    middle = prompt + config.max_new_tokens // 2  # costs are linear in the number of cached tokens
    first = costs.forward.of(width, prompt, 0, 1)
    return batches * (first + config.max_new_tokens * costs.forward.of(width, 1, middle, 1))


def _passes(config: TrainConfig, costs: ModelCosts, prompt: int, rows: int, *, chunks: bool) -> float:
    """Return the cost of the passes for one question, by the way that the settings name or the cheapest."""
    tokens, units = config.max_new_tokens, num_units(config)
    ends = [tokens * (place + 1) // units for place in range(units)]
    spans = tuple(UnitSpan(start, end, rows) for start, end in zip([0, *ends], ends, strict=False) if end > start)
    shape = GroupShape(prompt, (tokens,) * rows, spans)
    known = [config.step_gradient] if config.step_gradient in COSTS else [n for n in COSTS if chunks or n != "chunked"]
    if config.gradient_checkpointing:
        costs, known = costs.recomputing(), [name for name in known if name != "chunked"]
    if config.step_gradient == "recomputed":  # each chunk runs forward once more for every unit that needs it
        costs = costs.recomputing()
    return min(COSTS[name](shape, costs, True) for name in known)
