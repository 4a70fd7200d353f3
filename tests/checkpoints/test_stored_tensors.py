"""Parameters that are put together from a folder's tensors, and back."""

from __future__ import annotations

import torch

from ssrctl.checkpoints.names import Part
from ssrctl.checkpoints.stored_tensors import StoredTensors


def test_changes_and_whole_tensors_go_to_the_tensors_they_came_from() -> None:
    stored = StoredTensors(
        {"a": (2, 3), "b": (3,), "c": (4,), "plain": (2, 2)},
        {
            "joined": (Part("b", 0, 3), Part("a", 0, 6)),  # whole tensors, one after the other
            "first": (Part("c", 2, 2),),  # two parameters in one tensor
            "second": (Part("c", 0, 2),),
            "renamed": (Part("plain", 0, 4),),
        },
    )
    tensors = {name: torch.randn(shape) for name, shape in stored.shapes.items()}
    named = {
        "joined": torch.cat([tensors["b"], tensors["a"].flatten()]).view(3, 3),
        "first": tensors["c"][2:],
        "second": tensors["c"][:2],
        "renamed": tensors["plain"].T.contiguous().T,
    }
    back = stored.tensors(named)
    assert back.keys() == tensors.keys() and all(back[name].equal(tensors[name]) for name in back)
    changes = {"joined": [1, 3, 8], "first": [0], "second": [1], "renamed": []}
    found = stored.changes(
        {name: (torch.tensor(at, dtype=torch.int64), named[name].flatten()[at]) for name, at in changes.items()}
    )
    assert {name: where.tolist() for name, (where, _) in found.items()} == {"b": [1], "a": [0, 5], "c": [1, 2]}
    assert all(tensors[name].flatten()[where].equal(values) for name, (where, values) in found.items())
