"""A measure is one class: one that is registered from outside reaches every output, and tensors are read once."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ssrctl.checkpoints.pairs import TensorPair
from ssrctl.checkpoints.reader import TensorReader
from ssrctl.cli import main
from ssrctl.measures import base as protocol
from ssrctl.measures.base import Findings, PairMeasure, register, registered
from ssrctl.report.document import Column, Section, Table
from ssrctl.report.formats import percent

Q, DOWN, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"


class NegativeShare(PairMeasure[tuple[int, int], float]):
    """Share of the weights that became negative."""

    name = "toy"

    def tensor(self, pair: TensorPair) -> tuple[int, int]:
        return int(((pair.base >= 0) & (pair.tuned < 0)).sum()), pair.base.numel()

    def combine(self, parts: Mapping[str, list[tuple[int, int]]]) -> float:
        counts = [one for several in parts.values() for one in several]
        return sum(flipped for flipped, _ in counts) / sum(numel for _, numel in counts)

    def present(self, result: float) -> Findings:
        table = Table(title="Signs", columns=["sign", Column("share", percent)], rows=[["now negative", result]])
        return Findings(
            numbers={"negative_share": result},
            headlines=[f"{percent(result)} became negative."],
            sections=[Section(title="Toy", tables=[table])],
        )


@pytest.fixture
def toy() -> Iterator[None]:
    registered()  # this package's measures first, as the command does
    register(NegativeShare)
    yield
    del protocol._REGISTRY["toy"]
    assert "toy" not in registered()


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A base, a checkpoint with 3 of its 7 + 6 x 20 + 20 x 12 weights turned negative, and one with 5."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    shapes = {Q: (6, 20), DOWN: (20, 12), NORM: (7,)}
    weights = {name: torch.rand(shape, generator=generator) + 0.1 for name, shape in shapes.items()}
    for label, flipped in (("base", 0), ("one", 3), ("two", 5)):
        tensors = {name: tensor.clone() for name, tensor in weights.items()}
        tensors[Q].view(-1)[:flipped] *= -1
        (tmp_path / label).mkdir()
        save_file(tensors, tmp_path / label / "model.safetensors")
    return ["base", "one", "two"]


def test_a_measure_from_outside_reaches_every_output(
    toy: None, folders: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert main(["diagnose", *folders[:2], "--measures", "toy", "-o", "out"]) == 0
    expected, shown, out = 3 / 367, "0.82%", tmp_path / "out"
    assert json.loads((out / "diagnose.json").read_text())["negative_share"] == expected
    [_, [_, cell]] = csv.reader((out / "diagnose-tables" / "signs.csv").open())
    assert float(cell) == expected
    printed = capfd.readouterr().out
    assert f"{shown} became negative." in printed and "now negative" in printed
    page = (out / "diagnose.html").read_text()
    assert f"{shown} became negative." in page and f"<td>{shown}</td>" in page


def test_a_measure_that_is_not_registered_is_refused(folders: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", *folders[:2], "--measures", "toy"]) == 2
    assert "there is no measure 'toy'" in capfd.readouterr().err


def test_two_measures_of_one_name_are_refused(toy: None) -> None:
    class Other(NegativeShare):
        pass

    assert register(NegativeShare) is NegativeShare  # once more is harmless
    with pytest.raises(ValueError, match="'toy' is registered already"):
        register(Other)


@pytest.mark.parametrize("labels", [("base", "one"), pytest.param(("base", "one", "two"), marks=pytest.mark.slow)])
def test_all_measures_read_each_tensor_of_each_checkpoint_once(
    toy: None, labels: tuple[str, ...], folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[str, str]] = []

    def counted(method: str) -> None:
        read = getattr(TensorReader, method)

        def wrapper(reader: TensorReader, name: str, *args: Any, **settings: Any) -> Any:
            reads.append((reader.label, name))
            return read(reader, name, *args, **settings)

        monkeypatch.setattr(TensorReader, method, wrapper)

    counted("tensor")
    counted("pieces")
    several = ["overlap"] if len(labels) > 2 else []
    pairwise = [name for name, one in registered().items() if issubclass(one, PairMeasure) and not one.audits]
    assert {"sparsity", "rank", "spectrum", "landing", "toy"} <= set(pairwise)
    words = ["--measures", ",".join([*pairwise, *several]), "--assert-moved", "*q_proj*", "--json", "-o", "out"]
    assert main(["diagnose", *labels, *words]) == 0
    assert Counter(reads) == {(label, name): 1 for label in labels for name in (Q, DOWN, NORM)}
