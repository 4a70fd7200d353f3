"""What a mask holds, counted by hand."""

from __future__ import annotations

from typing import Any

import torch

from ssrctl.core.mask import BlockMask
from ssrctl.masks.table import mask_document, mask_numbers


def flags(shape: tuple[int, ...], count: int) -> torch.Tensor:
    flat = torch.zeros(shape, dtype=torch.bool).flatten()
    flat[:count] = True
    return flat.view(shape)


def numbers_of(mask: BlockMask) -> dict[str, Any]:
    return mask_numbers(mask.shapes, {name: tiles.count() for name, tiles in mask.tensors.items()})


def test_counts_by_layer_and_by_kind() -> None:
    mask = BlockMask.from_dense(
        {
            "model.layers.10.mlp.up_proj.weight": flags((20, 10), 50),
            "model.layers.2.mlp.up_proj.weight": flags((20, 10), 0),
            "model.layers.2.self_attn.q_proj.weight": flags((4, 4), 16),
            "model.layers.2.self_attn.q_proj.bias": flags((4,), 1),
            "model.norm.weight": flags((0,), 0),
            "lm_head.weight": flags((3,), 3),
        }
    )
    numbers = numbers_of(mask)
    assert (numbers["coordinates"], numbers["selected"], numbers["selected_frac"]) == (423, 70, 70 / 423)
    assert (numbers["num_tensors"], numbers["num_tensors_selected"]) == (6, 4)

    def rows(part: str, key: str) -> list[tuple]:
        return [(row[key], row["coordinates"], row["selected"], row["selected_frac"]) for row in numbers[part]]

    assert rows("layers", "layer") == [("2", 220, 17, 17 / 220), ("10", 200, 50, 0.25), ("other", 3, 3, 1.0)]
    assert rows("kinds", "kind") == [
        ("q", 20, 17, 17 / 20),
        ("up", 400, 50, 0.125),
        ("norm", 0, 0, None),
        ("lm_head", 3, 3, 1.0),
    ]
    assert rows("tensors", "name")[0] == ("lm_head.weight", 3, 3, 1.0)
    assert [row["shape"] for row in numbers["tensors"]][-2:] == [[4, 4], [0]]


def test_a_mask_over_nothing_has_no_share() -> None:
    numbers = mask_numbers({}, {})
    assert numbers["selected_frac"] is None and numbers["layers"] == numbers["kinds"] == numbers["tensors"] == []


def test_the_document_shows_the_numbers() -> None:
    numbers = numbers_of(BlockMask.from_dense({"model.layers.0.mlp.up_proj.weight": flags((50, 40), 1999)}))
    report = {"mask": "m", "mask_kind": "steps", "model": None, "bytes": 1234, "notes": ["odd"]} | numbers
    document = mask_document(report)
    assert document.headlines == ["1,999 of 2,000 weights selected (99.95%), in 1 of 1 tensor; 1.2 kB."]
    assert document.facts == [("mask", "m"), ("kind", "steps"), ("model", "not recorded")]
    assert document.notes == ["odd"]
    assert [table.formatted() for table in document.sections[0].tables] == [
        [["0", "1,999", "2,000", "99.95%"]],
        [["up", "1,999", "2,000", "99.95%"]],
    ]
