"""What the logs see of gradients: against plain definitions, in both scopes, and without touching anything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ssrctl.configs import TrainConfig
from ssrctl.core.mask import BlockMask
from ssrctl.core.units import Unit
from ssrctl.io.mask_log import CONFLICTS
from ssrctl.training.unit_gradients import UnitGradient
from ssrctl.training.unit_observer import QuestionView, UnitObserver, Wanted
from ssrctl.training.updaters import frozen_coordinates, make_updater

SHAPES = {"w": (6, 10), "v": (20,)}
EVERYTHING = Wanted(sets=True, conflict=True, sketch=True)


def parameters() -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}


def drawn(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(count)]


def frozen(*indices: int) -> BlockMask:
    return BlockMask.from_indices(SHAPES, {"w": torch.tensor(indices, dtype=torch.int64)})


def see(
    gradients: list[dict[str, Tensor]],
    budget: float = 0.1,
    wanted: Wanted = EVERYTHING,
    mask: BlockMask | None = None,
    **settings: object,
) -> tuple[QuestionView, list, dict[str, torch.nn.Parameter]]:
    """Real backward passes with these gradients, watched, then claimed by the updater of the settings."""
    named = parameters()
    config = TrainConfig(**settings)  # type: ignore[arg-type]
    updater = make_updater(list(named.items()), config, mask)
    view = UnitObserver(list(named.items()), config, mask).question(wanted)

    def backward() -> Iterator[UnitGradient]:
        for number, gradient in enumerate(gradients):
            unit = Unit((number,), budget, ((1.0,),))
            view.before_unit(unit)
            updater.before_unit(unit)
            # used twice, as tied weights are: a hook must see the sum
            sum(
                (p * (gradient[name] / 2)).sum() + (p * (gradient[name] / 2)).sum() for name, p in named.items()
            ).backward()
            yield UnitGradient(unit, 0.5, 1, 0)

    update = updater.add_question(view.watch(backward()))
    updater.step()
    return view, update.kept, named


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient[name].double().flatten() for name in SHAPES])


def positions(indices: dict[str, Tensor]) -> set[int]:
    offsets = {"w": 0, "v": 60}
    return {offsets[name] + int(i) for name, found in indices.items() for i in found}


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_norms_sets_and_energies(scope: str) -> None:
    gradients = drawn(3)
    barred = (0, 7, 8, 59)
    view, kept, _ = see(gradients, 0.1, Wanted(sets=True), frozen(*barred), scope=scope)
    k = int(0.1 * 76)
    for seen, gradient, unit in zip(view.units, gradients, kept, strict=True):
        values = flat(gradient)
        assert seen.square == pytest.approx(float(values.square().sum()), rel=1e-6)
        magnitudes = values.abs()
        magnitudes[list(barred)] = -1.0
        if scope == "global":
            expected = set(magnitudes.argsort(descending=True)[:k].tolist())
        else:  # the same share of each tensor's free coordinates: 56 and 20
            parts = ((0, magnitudes[:60], k * 56 // 76), (60, magnitudes[60:], k * 20 // 76))
            expected = {start + int(i) for start, part, size in parts for i in part.argsort(descending=True)[:size]}
        assert seen.top is not None and positions(seen.top) == expected
        assert seen.top_captured == pytest.approx(
            float(values[sorted(expected)].square().sum() / values.square().sum()), rel=1e-6
        )
        got = sorted(positions({name: chosen.to_indices() for name, chosen in unit.sets.items()}))
        captured = seen.captured(unit)
        assert captured == pytest.approx(float(values[got].square().sum() / values.square().sum()), rel=1e-6)
        assert captured is not None and captured <= (seen.top_captured or 0) + 1e-9
    # the first unit found nothing claimed
    first = positions({name: chosen.to_indices() for name, chosen in kept[0].sets.items()})
    assert view.units[0].top is not None and positions(view.units[0].top) == first
    assert view.units[0].dense == {} and view.sketched is None


def test_conflict_is_that_of_the_whole_gradients() -> None:
    gradients = drawn(3)
    gradients[2]["w"][:3] = 0.0
    view, _, _ = see(gradients, 0.05)
    tops = [sorted(positions(seen.top or {})) for seen in view.units]
    found = view.conflict()
    assert set(found.shares) == set(CONFLICTS)
    for i in range(3):
        assert found.cosine[i][i] == 1.0 and all(found.shares[name][i][i] is None for name in CONFLICTS)
        for j in range(i):
            a, b = flat(gradients[i]), flat(gradients[j])
            assert found.cosine[i][j] == found.cosine[j][i]
            assert found.cosine[i][j] == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-6)
            union = sorted({*tops[i], *tops[j]})
            expected = []
            for product in (a * b, (a * b)[union]):
                nonzero = product[product != 0]
                expected.append(float((nonzero < 0).double().mean()))
                expected.append(float(-nonzero[nonzero < 0].sum() / nonzero.abs().sum()))
            for name, value in zip(CONFLICTS, expected, strict=True):
                assert found.shares[name][i][j] == found.shares[name][j][i] == pytest.approx(value, abs=1e-6)
    assert all(seen.dense == {} for seen in view.units)


def test_a_zero_gradient_agrees_with_nothing() -> None:
    gradients = drawn(2)
    gradients[1] = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    view, kept, _ = see(gradients, 0.05)
    found = view.conflict()
    assert found.cosine == [[1.0, 0.0], [0.0, 0.0]] and found.shares["conflict"][0][1] is None
    assert view.units[1].captured(kept[1]) is None and view.units[1].top_captured is None


@pytest.mark.parametrize(
    "settings",
    [{}, {"scope": "tensor"}, {"allocation": "shuffled"}, {"allocation": "overlap"}, {"optimizer": "adamw"}],
    ids=["global", "tensor", "shuffled", "overlap", "adamw"],
)
def test_looking_changes_nothing_and_the_sketch_is_the_sum(settings: dict) -> None:
    gradients = drawn(1 if settings.get("optimizer") == "adamw" else 3)
    results = []
    for wanted in (Wanted(), Wanted(sets=True, sketch=True)):
        view, _, named = see(gradients, 0.1, wanted, frozen(3), learning_rate=0.1, **settings)
        results.append({name: parameter.detach().view(torch.int32) for name, parameter in named.items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in SHAPES)
    assert any(bool(bits.any()) for bits in results[0].values())
    assert view.sketched is not None  # 80 coordinates: stored exactly
    torch.testing.assert_close(view.sketched, sum(map(flat, gradients)), rtol=0, atol=1e-6)  # type: ignore[arg-type]


def test_hooks_do_not_outlive_the_question() -> None:
    named = parameters()
    config = TrainConfig(scope="tensor")
    view = UnitObserver(list(named.items()), config, None).question(Wanted(sets=True))
    view.before_unit(Unit((0,), 0.1, ((1.0,),)))

    def broken() -> Iterator[UnitGradient]:
        named["w"].sum().backward()
        raise RuntimeError("planted")
        yield

    with pytest.raises(RuntimeError, match="planted"):
        next(view.watch(broken()))
    assert view.units[0].square == pytest.approx(60.0)
    named["w"].sum().backward()
    assert view.units[0].square == pytest.approx(60.0)


def test_nan_where_only_the_log_looks_is_no_reason_to_stop() -> None:
    """The unconstrained set looks at coordinates that are claimed already; NaN there must not drop the question."""
    gradients = drawn(2)
    gradients[0]["w"].view(-1)[5] = 100.0  # claimed by the first unit
    gradients[1]["w"].view(-1)[5] = float("nan")
    view, kept, _ = see(gradients, 0.1, Wanted(sets=True))
    assert len(kept) == 2 and view.units[0].top is not None
    assert view.units[1].top is None and view.units[1].top_captured is None and view.units[1].captured(kept[1]) is None


def test_what_is_frozen() -> None:
    mask = BlockMask.from_indices(SHAPES, {"w": torch.tensor([1, 2, 3])})
    assert frozen_coordinates(None, None) is None
    assert frozen_coordinates(frozen(2), None) is not None
    for protected, count in ((None, 77), (frozen(2), 78), (frozen(9), 77)):
        found = frozen_coordinates(protected, mask)
        assert found is not None and found.count() == count
