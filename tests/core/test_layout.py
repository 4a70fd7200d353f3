"""The common numbering of coordinates, and its shards."""

import torch

from ssrctl.core import layout
from ssrctl.core.bits import bits_from_indices
from ssrctl.core.kronos import KronosOpt
from ssrctl.core.layout import Layout, Shards

TENSORS = {"a": torch.empty(3, 5), "none": torch.empty(0), "s": torch.empty(()), "b": torch.empty(70)}


def test_positions_and_bits_go_both_ways():
    made = Layout(TENSORS, align=64)
    assert (made.offsets, made.size) == ({"a": 0, "none": 64, "s": 64, "b": 128}, 256)
    indices = {"a": torch.tensor([0, 14]), "s": torch.tensor([0]), "b": torch.tensor([3, 69])}
    positions = made.join(indices)
    assert positions.tolist() == [0, 14, 64, 131, 197]
    found = {name: part.tolist() for name, part in made.split(positions).items()}
    assert found == {"a": [0, 14], "none": [], "s": [0], "b": [3, 69]}
    views = made.bits(bits_from_indices(positions, made.size))
    for name, tensor in TENSORS.items():
        expected = bits_from_indices(indices.get(name, torch.empty(0, dtype=torch.int64)), tensor.numel())
        assert torch.equal(views[name], expected), name


def test_shards_end_at_the_size_and_where_the_dtype_changes(monkeypatch):
    monkeypatch.setattr(layout, "SHARD", 100)
    half = {"h": torch.empty(2, dtype=torch.bfloat16), "i": torch.empty(2, dtype=torch.bfloat16)}
    shards = Shards({"a": torch.empty(60), "b": torch.empty(40), "c": torch.empty(300), **half, "d": torch.empty(1)})
    assert [list(one.numels) for one in shards.layouts] == [["a", "b"], ["c"], ["h", "i"], ["d"]]
    shards.add({"e": torch.empty(1)})
    assert shards.number_of == {"a": 0, "b": 0, "c": 1, "h": 2, "i": 2, "d": 3, "e": 4}
    empty = torch.empty(0, dtype=torch.int64)
    some = {"a": torch.tensor([7]), "b": empty, "c": empty, "i": torch.tensor([1])}
    assert [(n, list(part)) for n, part in shards.parts(some)] == [(0, ["a"]), (2, ["i"])]


def trained(monkeypatch, size):
    """The norms, weights and state after two steps with two groups, in shards of at most ``size``."""
    monkeypatch.setattr(layout, "SHARD", size)
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (9, 7), "b": (), "c": (130,), "d": (40,)}
    named = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    groups = [{"params": list(part)} for part in (list(named.items())[:1], list(named.items())[1:])]
    optimizer = KronosOpt(groups, lr=0.1, update_rule="adam", budget=0.4, max_step_budget=0.2)
    norms = []
    for _ in range(2):
        optimizer.begin_question(3)
        for _ in range(3):
            for parameter in named.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.claim()
        norms.append(optimizer.step().grad_norm)
    state = optimizer.state_dict()["state"]
    weights = [parameter.tolist() for parameter in named.values()]
    return norms, weights, {number: {k: v.tolist() for k, v in kept.items()} for number, kept in state.items()}


def test_results_do_not_depend_on_the_shards(monkeypatch):
    alone = trained(monkeypatch, 1)
    assert trained(monkeypatch, 135) == alone
    assert trained(monkeypatch, 10**9) == alone
