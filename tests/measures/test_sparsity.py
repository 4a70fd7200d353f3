"""Update sparsity on pairs whose differences were planted, so that every number is known."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ssrctl.checkpoints.delta import Delta, changed_indices
from ssrctl.checkpoints.names import layer_index, matrix_kind
from ssrctl.checkpoints.pairs import Checkpoint, Comparison, common_dtype, open_pairs
from ssrctl.checkpoints.reader import DeltaReader, TensorReader
from ssrctl.configs import DiagnoseConfig
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity
from ssrctl.measures.base import take
from ssrctl.measures.maths.change import Change, add_up
from ssrctl.measures.maths.change_rule import changed
from ssrctl.measures.maths.grouping import Grouped, group
from ssrctl.measures.maths.largest_changes import LargestChanges
from ssrctl.measures.maths.piece_pair import Tally, piece_pairs
from ssrctl.measures.sparsity import (
    Sparsity,
    SparsityResult,
    headlines,
    nonfinite_notes,
    rules_section,
    size_section,
    sparsity_sections,
)
from ssrctl.report.document import Dots, Heatmap, Lines

ATOL, ETA = 1e-5, 1e-3


def compare_tensors(base: torch.Tensor, tuned: torch.Tensor, atol: float = ATOL, eta: float = ETA) -> Change:
    tally, start = Tally("w", atol, eta, LargestChanges()), 0
    for piece in piece_pairs(base, tuned):
        tally.add(piece, start)
        start += piece.numel
    return tally.total()


def grouped(**changes: Change) -> Grouped[Change, Change]:
    return group(changes, add_up)


def measured(comparison: Comparison, num_workers: int = 2) -> SparsityResult:
    """The result of the measure, taken as `ssrctl diagnose` does."""
    config = DiagnoseConfig(paths=[Path("base"), Path("tuned")])
    [taken] = take(comparison, [Sparsity(comparison, config)], "pair", num_workers)
    found: SparsityResult = taken.result
    return found


def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """200 weights of 0.5 in float64, of which 3 move by half the tolerance and 2 by twice it."""
    base = torch.full((10, 20), 0.5, dtype=torch.float64)
    tuned = base.clone()
    tuned[0, :3] -= ATOL / 2
    tuned[3, 7] = 0.5 + 2 * ATOL
    tuned[9, 19] = 0.5 - 2 * ATOL
    return base, tuned


def test_planted_changes_are_counted() -> None:
    change = compare_tensors(*planted(), ATOL)
    assert (change.numel, change.num_equal, change.num_within) == (200, 195, 198)
    assert change.sparsity == 198 / 200 and change.bit_equal_frac == 195 / 200
    assert change.max_abs == pytest.approx(2 * ATOL, rel=1e-9)
    assert change.mean_abs_difference == pytest.approx((3 * ATOL / 2 + 4 * ATOL) / 200, rel=1e-9)
    squares = 3 * (ATOL / 2) ** 2 + 2 * (2 * ATOL) ** 2
    assert change.relative_l2 == pytest.approx(math.sqrt(squares / (200 * 0.25)), rel=1e-9)
    numbers = change.numbers()
    assert (numbers["num_changed"], numbers["num_bit_changed"]) == (2, 5)


@pytest.mark.parametrize(("steps", "within"), [(7, 1), (8, 1), (9, 0)])
def test_a_change_of_exactly_the_tolerance_is_within_it(steps: int, within: int) -> None:
    # differences of multiples of 2^-20 around 1 are exact, and so is the tolerance
    tuned = torch.tensor([1.0 + steps * 2.0**-20])
    for a, b in ((torch.ones(1), tuned), (tuned, torch.ones(1))):
        change = compare_tensors(a, b, 8 * 2.0**-20)
        assert (change.num_within, change.num_equal) == (within, 0)


def test_tolerance_zero_still_lets_zero_and_minus_zero_agree() -> None:
    change = compare_tensors(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), 0.0)
    assert (change.num_within, change.num_equal) == (2, 1)


def test_identical_checkpoints_are_wholly_sparse() -> None:
    base, _ = planted()
    base[0, 0], base[0, 1] = float("nan"), float("inf")
    change = compare_tensors(base, base.clone(), 0.0)
    assert change.sparsity == change.bit_equal_frac == 1.0
    assert change.relative_l2 == change.mean_abs_difference == change.max_abs == 0.0
    assert headlines(grouped(w=change), ATOL) == [
        "The two checkpoints are identical bit for bit: 200 weights, sparsity 1."
    ]


def test_weights_that_are_no_numbers_are_counted_and_left_out_of_norms() -> None:
    nan, inf = float("nan"), float("inf")
    base = torch.tensor([1.0, nan, 2.0, inf, inf, -inf, 2.0])
    tuned = torch.tensor([1.0, nan, nan, inf, 1.0, inf, 4.0])
    change = compare_tensors(base, tuned, ATOL)
    assert (change.num_nan_base, change.num_inf_base, change.num_nan_tuned, change.num_inf_tuned) == (1, 3, 2, 2)
    # equal: 1, the same NaN, the same infinity; finite differences: those and 2 -> 4
    assert (change.num_equal, change.num_within, change.num_finite) == (3, 3, 4)
    assert (change.max_abs, change.sum_abs, change.sum_sq, change.base_sum_sq) == (2.0, 2.0, 4.0, 1 + 4 + 4)
    [note] = nonfinite_notes(change)
    assert "1 nan in base, 3 inf in base, 2 nan in tuned, 2 inf in tuned" in note
    assert nonfinite_notes(compare_tensors(torch.ones(2), torch.ones(2), 0.0)) == []


def test_bf16_against_fp32_is_compared_in_fp32() -> None:
    torch.manual_seed(0)
    base = torch.randn(40, 50).to(torch.bfloat16)
    assert compare_tensors(base, base.float(), 0.0).num_equal == 2000
    tuned = base.float()
    tuned[5, :7] += 3e-3  # under half a unit in the last place of many bf16 weights, yet counted
    for pair in ((base, tuned), (tuned, base)):
        change = compare_tensors(*pair, ATOL)
        assert (change.num_equal, change.num_within) == (1993, 1993)
    assert compare_tensors(base, tuned.to(torch.bfloat16), ATOL).num_within > 1993


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float8_e4m3fn, torch.float8_e5m2, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16, torch.float32),
        (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e4m3fn),
    ],
)
def test_common_dtype_holds_both(a: torch.dtype, b: torch.dtype, expected: torch.dtype) -> None:
    assert common_dtype(a, b) == common_dtype(b, a) == expected
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert compare_tensors(every, every.to(torch.float32), 0.0).num_within >= 254  # all but NaNs


# Zhu et al. 2025, app. E.1: where a fixed tolerance fails


def all_rules(base: torch.Tensor, tuned: torch.Tensor, **given: float) -> list[bool]:
    return [bool(changed(base, tuned, rule, **given).any()) for rule in ("atol", "bf16", "bits")]  # type: ignore[arg-type]


def test_large_weights_that_are_one_bf16_number_did_not_change() -> None:
    # Between 1024 and 2048 bfloat16 has steps of 8: both are stored as 1024, though 1e-3 apart.
    base, tuned = torch.tensor([1024.001]), torch.tensor([1024.002])
    assert all_rules(base, tuned) == [True, False, True]
    assert all_rules(base.to(torch.bfloat16), tuned.to(torch.bfloat16)) == [False, False, False]
    change = compare_tensors(base, tuned)
    assert (change.num_within, change.num_same_bf16, change.num_equal) == (0, 1, 0)


def test_small_weights_that_doubled_did_change() -> None:
    # 1e-6 apart, a tenth of the tolerance, and 128 bfloat16 numbers: as many as there are in a binade.
    base, tuned = (torch.tensor([value]).to(torch.bfloat16) for value in (1e-6, 2e-6))
    assert all_rules(base, tuned) == all_rules(base.float(), tuned.float()) == [False, True, True]
    change = compare_tensors(base, tuned)
    assert (change.num_within, change.num_same_bf16, change.num_equal) == (1, 0, 0)
    assert change.nums_within == (0, 0, 1, 1)  # as bfloat16, the two are 9.98e-7 apart
    assert change.ulps == (0, 0, 0, 0, 0, 0, 0, 1) and change.num_below_step == 0


def every_bf16() -> torch.Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


@pytest.mark.parametrize("eta", [1e-3, 2**-9])
def test_neighbouring_bf16_numbers_differ_by_the_rule(eta: float) -> None:
    # corollary E.4, which leaves out zeros and subnormal numbers; they need no exception either
    numbers = every_bf16()[:0x7F80]
    up = numbers[1:]
    assert changed(numbers[:-1], up, "bf16", eta=eta).all() and changed(up, numbers[:-1], "bf16", eta=eta).all()
    assert compare_tensors(numbers[:-1], up, eta=eta).num_same_bf16 == 0
    assert not changed(every_bf16(), every_bf16().clone(), "bf16", eta=eta).any()
    # a wide eta is taken at its word, even where no step lies below it
    wide = changed(numbers[:-1], up, "bf16", eta=1.0)
    assert not wide.any() and compare_tensors(numbers[:-1], up, eta=1.0).num_same_bf16 == len(up)


SPECIAL = [0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1.001, 1.01, 1e-6, 2e-6, 1024.001, 1024.002, 3.4e38]


@pytest.mark.parametrize("dtypes", [("bfloat16",) * 2, ("float32",) * 2, ("float16",) * 2, ("bfloat16", "float32"),
                                    ("float64", "float32"), ("float8_e4m3fn", "bfloat16"), ("int16", "int16"),
                                    ("uint16", "uint16"), ("bool", "bool"), ("int8", "float32")])  # fmt: skip
def test_counts_are_those_of_the_rules(dtypes: tuple[str, str]) -> None:
    grid = torch.tensor(SPECIAL, dtype=torch.float64)
    whole = not (getattr(torch, dtypes[0]).is_floating_point)
    sides = [grid.repeat_interleave(len(SPECIAL)), grid.repeat(len(SPECIAL))]
    if whole:
        sides = [side.nan_to_num(0, 5, 7).clamp(0, 100) for side in sides]
    base, tuned = (side.to(getattr(torch, dtype)) for side, dtype in zip(sides, dtypes, strict=True))
    change = compare_tensors(base, tuned)
    wide = common_dtype(base.dtype, tuned.dtype)
    for marks, same in ((changed(base, tuned, "bits"), change.num_equal), (changed(base, tuned, "atol"), change.num_within),
                        (changed(base, tuned, "bf16"), change.num_same_bf16)):  # fmt: skip
        assert marks.dtype == torch.bool and marks.shape == base.shape
        assert int((~marks).sum()) == same
    for a, b, bits, atol, bf16 in zip(
        base.to(wide).tolist(), tuned.to(wide).tolist(), *(changed(base, tuned, rule).tolist() for rule in RULES),
        strict=True,
    ):  # fmt: skip
        a, b = float(a), float(b)
        if not math.isnan(a):  # two NaNs may differ in their bits
            assert bits == (a != b or math.copysign(1, a) != math.copysign(1, b))
        assert atol == (bits and not abs(a - b) <= ATOL)
        if whole:
            assert bf16 == (bits if not wide.is_floating_point else bf16)
        else:
            x, y = (float(torch.tensor(value).to(torch.bfloat16)) for value in (a, b))
            near = math.isfinite(x - y) and abs(x - y) <= 1e-3 * max(abs(x), abs(y))
            assert bf16 == (bits and not (near or x == y))


RULES = ("bits", "atol", "bf16")


def test_changed_keeps_the_shape_and_refuses_what_it_does_not_know() -> None:
    base, tuned = planted()
    assert changed(base, tuned, "bits").nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [3, 7], [9, 19]]
    assert changed(base, tuned, "atol").nonzero().tolist() == [[3, 7], [9, 19]]
    assert not changed(base, tuned, "atol", atol=1.0).any()
    assert changed(torch.ones(()), torch.zeros(()), "bits").shape == ()
    assert changed(torch.ones(0, 3), torch.ones(0, 3), "atol").shape == (0, 3)
    assert torch.equal(changed(base.T, tuned.T, "bits"), changed(base, tuned, "bits").T)
    with pytest.raises(ValueError, match="no rule 'ulp'"):
        changed(base, tuned, "ulp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shapes differ"):
        changed(base, tuned[:3], "bits")


def test_planted_steps_are_counted() -> None:
    base = torch.linspace(0.01, 0.02, 1000).to(torch.bfloat16)
    steps = torch.zeros(1000, dtype=torch.int16)
    for size, places in {
        1: range(60),
        -1: range(60, 80),
        2: range(80, 90),
        3: range(90, 95),
        40: range(95, 99),
    }.items():
        steps[list(places)] = size
    tuned = (base.view(torch.int16) + steps).view(torch.bfloat16)
    change = compare_tensors(base, tuned)
    assert change.ulps == (80, 10, 5, 0, 0, 0, 4) and change.num_stepped == 99
    assert change.one_step_frac == 80 / 99
    assert change.numbers()["ulp_distances"] == {"1": 80, "2": 10, "3-4": 5, "33-64": 4}
    # stored wide on one side, steps are still those of the narrow one, and less than one of them is none
    assert compare_tensors(base, tuned.float()).ulps == change.ulps
    little = base.float() * (1 + 2**-12)
    assert compare_tensors(base, little).num_below_step == 1000 and compare_tensors(base, little).ulps == ()


@given(st.lists(st.tuples(*[st.floats(width=32, allow_nan=False, allow_infinity=False)] * 2), max_size=20),
       st.sampled_from([0.0, ATOL, 1.0]))  # fmt: skip
def test_counts_are_those_of_python_floats(pairs: list[tuple[float, float]], atol: float) -> None:
    base, tuned = (torch.tensor([pair[side] for pair in pairs], dtype=torch.float32) for side in (0, 1))
    change = compare_tensors(base, tuned, atol)
    differences = [abs(b - a) for a, b in pairs]
    assert change.num_within == sum(difference <= atol for difference in differences)
    assert change.num_equal == sum(a.hex() == b.hex() for a, b in pairs)
    assert change.sum_abs == pytest.approx(math.fsum(differences))
    assert change.max_abs == max(differences, default=0.0)
    assert change.num_finite == change.numel == len(pairs)


def test_slices_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = planted()
    whole = compare_tensors(base, tuned, ATOL)
    monkeypatch.setattr("ssrctl.measures.maths.piece_pair._CHUNK", 7)
    parts = compare_tensors(base.T, tuned.T, ATOL)  # not contiguous either
    assert parts.max_abs == whole.max_abs  # the largest, not the sum
    assert parts.sum_abs == pytest.approx(whole.sum_abs)
    assert (parts.numel, parts.num_equal, parts.num_within) == (whole.numel, whole.num_equal, whole.num_within)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_norms_of_many_weights_at_any_scale(scale: float) -> None:
    base = (torch.randn(8 * 1024, generator=torch.Generator().manual_seed(0)) * scale).to(torch.bfloat16)
    expected = math.fsum(value * value for value in base.double().tolist())
    assert compare_tensors(base, base).base_sum_sq == pytest.approx(expected, rel=1e-6)
    base[7] = math.inf
    change = compare_tensors(base, base)
    assert change.num_inf_base == change.num_inf_tuned == 1 and change.num_equal == len(base)
    rest = math.fsum(value * value for value in base.double().tolist() if math.isfinite(value))
    assert change.base_sum_sq == pytest.approx(rest, rel=1e-6)


def test_the_report_has_every_rule_and_the_largest_changes(tmp_path: Path) -> None:
    base, tuned = planted()
    names = ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight")
    save_file({names[0]: base, names[1]: base.clone()}, tmp_path / "base.safetensors")
    save_file({names[0]: tuned, names[1]: base.clone()}, tmp_path / "tuned.safetensors")
    with contextlib.ExitStack() as stack:
        result = measured(open_pairs(stack, [(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")]))
    numbers = result.numbers()
    assert [numbers["total"][key] for key in ("sparsity_1e-08", "sparsity_1e-07", "sparsity_1e-06", "sparsity_1e-05")] == [
        395 / 400, 395 / 400, 395 / 400, 398 / 400,
    ]  # fmt: skip
    assert [row["position"] for row in numbers["movers"]["absolute"]][:2] == [[3, 7], [9, 19]]
    rules, size = rules_section(result.changes, 3e-5), size_section(result)
    assert [row[0] for row in rules.tables[0].rows][-2:] == ["within 1e-05", "within 3e-05"]
    assert rules.tables[0].headings == ["rule", "all", "embed", "up"]
    assert rules.tables[0].rows[0] == ["bit for bit", 395 / 400, 1.0, 195 / 200]
    heat, dots = sparsity_sections(result, 3e-5)[0].figures
    assert isinstance(heat, Heatmap) and heat.row_labels == ["embed", "up"] and heat.column_labels == ["0", "out"]
    assert heat.values == [[None, 0.0], [5 / 200, None]] and "bit for bit" in heat.title  # nothing as bfloat16
    assert isinstance(dots, Dots) and dots.log and dots.labels == ["all", "embed", "up"]
    assert dots.series["bit for bit"] == [5 / 400, 0.0, 5 / 200]
    assert [one.label.split(": ")[1] for one in dots.references] == ["8.3% to 63.7%", "81.2% to 99.4%"]
    assert [table.title for table in size.tables][1:] == ["Largest changes", "Largest relative changes"]
    assert size.tables[1].rows[0][:2] == [names[0], "3, 7"]
    assert size.tables[1].formatted()[0][2:] == ["0.5", "0.50002", "+2e-05", "4.00e-05"]
    [histogram] = size.figures
    assert isinstance(histogram, Lines) and sum(histogram.series["changed weights"]) == 5  # type: ignore[arg-type]
    same = size_section(SparsityResult(grouped(w=compare_tensors(base, base)), LargestChanges(), {}))
    assert same.figures == [] and [len(table.rows) for table in same.tables] == [1, 0, 0]


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    """A base in bfloat16 and the same with a tenth of its weights moved, over several ranges and pieces."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.layers.0.mlp.up_proj.weight": (60, 70), "model.layers.1.mlp.up_proj.weight": (9, 100),
              "model.embed_tokens.weight": (130, 90), "model.norm.weight": (7,), "none": (0, 3)}  # fmt: skip
    base = {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}
    tuned = {}
    for name, one in base.items():
        moved = torch.rand(one.shape, generator=generator) < 0.1
        tuned[name] = torch.where(moved, one * (1 + torch.rand(one.shape, generator=generator)), one.float()).bfloat16()
    for label, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{label}.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ranges in a tensor, several pieces in a range, and several chunks in a piece, each a multiple."""
    monkeypatch.setattr("ssrctl.checkpoints.tensor_files.PIECE_ELEMENTS", 256)
    monkeypatch.setattr("ssrctl.measures.maths.piece_pair._CHUNK", 64)
    for module in ("ssrctl.checkpoints.pairs", "ssrctl.measures.sparsity"):
        monkeypatch.setattr(f"{module}.RANGE", 1024)


def test_a_tensor_that_is_whole_in_memory_has_the_same_sums(
    checkpoints: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    with contextlib.ExitStack() as stack:
        comparison = open_pairs(stack, [checkpoints])
        in_ranges = measured(comparison)
        monkeypatch.setattr(Sparsity, "in_ranges", False)
        assert measured(comparison).numbers() == in_ranges.numbers()


def test_checkpoints_in_pieces_are_those_of_whole_tensors(
    checkpoints: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        comparison = open_pairs(stack, [checkpoints])
        base, tuned, names = comparison.base, comparison.tuned[0].reader, comparison.names
        found = [measured(comparison, workers) for workers in (1, 2, 5)]
        assert found[0].numbers() == found[1].numbers() == found[2].numbers()
        assert list(found[0].changes.tensors) == names
        for name in names:
            a, b = base.tensor(name), tuned.tensor(name)
            whole, change = compare_tensors(a, b), found[0].changes.tensors[name]
            for field in ("sum_abs", "sum_sq", "base_sum_sq"):
                assert getattr(change, field) == pytest.approx(getattr(whole, field), rel=1e-12)
            counts = (
                "numel",
                "num_within",
                "nums_within",
                "num_same_bf16",
                "num_equal",
                "num_finite",
                "max_abs",
                "ulps",
            )
            assert all(getattr(change, field) == getattr(whole, field) for field in counts)
        every = torch.cat(
            [(base.tensor(name).double() - tuned.tensor(name).double()).abs().flatten() for name in names]
        )
        largest = found[0].largest
        assert [abs(one.change) for one in largest.absolute] == every.topk(20).values.tolist()
        for one in (*largest.absolute, *largest.relative):
            place = one.position(base.shapes[one.name])
            assert (one.before, one.after) == (
                float(base.tensor(one.name)[place]),
                float(tuned.tensor(one.name)[place]),
            )
    assert torch.get_num_threads() == threads


def test_a_delta_in_pieces_is_the_checkpoint_that_it_makes(
    checkpoints: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    with TensorReader(checkpoints[0]) as base, TensorReader(checkpoints[1]) as tuned:
        changes = {}
        for name in base.shapes:
            indices = changed_indices(base.tensor(name), tuned.tensor(name))
            if indices.numel():
                changes[name] = (indices, tuned.tensor(name).flatten()[indices])
        identity = ModelIdentity(name="base", revision=None, fingerprint="x")
        reader = DeltaReader("d", base, Delta(identity, dict(base.shapes), changes))
        names = list(base.shapes)
        as_delta, as_weights = (
            Comparison(base, [Checkpoint("one", side, side is reader)], names, []) for side in (reader, tuned)
        )
        assert measured(as_delta).numbers() == measured(as_weights).numbers()


def test_a_file_that_shrinks_under_the_readers_ends_in_one_error(checkpoints: tuple[Path, Path]) -> None:
    with contextlib.ExitStack() as stack:
        comparison = open_pairs(stack, [checkpoints])
        checkpoints[1].write_bytes(checkpoints[1].read_bytes()[:-9])
        with pytest.raises(UserError, match="ends too early"):
            measured(comparison)


def test_nothing_compared_has_no_sparsity() -> None:
    for change in (add_up([]), compare_tensors(torch.empty(0, 3), torch.empty(0, 3), ATOL)):
        assert change == Change() and change.sparsity is None and change.mean_abs_difference is None
    assert compare_tensors(torch.zeros(2), torch.ones(2), ATOL).relative_l2 is None
    assert compare_tensors(torch.zeros(2), torch.zeros(2), ATOL).relative_l2 == 0.0


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[3, 2\]"):
        compare_tensors(torch.ones(2, 3), torch.ones(3, 2), ATOL)
    with pytest.raises(ValueError, match="complex"):
        compare_tensors(torch.ones(2, dtype=torch.complex64), torch.ones(2), ATOL)


NAMES = {
    # Llama and Qwen
    "model.embed_tokens.weight": (None, "embed"),
    "model.layers.0.self_attn.q_proj.weight": (0, "q"),
    "model.layers.11.self_attn.k_proj.bias": (11, "k"),
    "model.layers.1.self_attn.v_proj.weight": (1, "v"),
    "model.layers.1.self_attn.o_proj.weight": (1, "o"),
    "model.layers.1.self_attn.q_norm.weight": (1, "norm"),
    "model.layers.1.mlp.gate_proj.weight": (1, "gate"),
    "model.layers.1.mlp.up_proj.weight": (1, "up"),
    "model.layers.1.mlp.down_proj.weight": (1, "down"),
    "model.layers.1.input_layernorm.weight": (1, "norm"),
    "model.norm.weight": (None, "norm"),
    "lm_head.weight": (None, "lm_head"),
    "model.layers.3.mlp.experts.7.down_proj.weight": (3, "down"),
    "model.layers.3.mlp.experts.gate_up_proj": (3, "gate_up"),
    "model.layers.3.mlp.gate.weight": (3, "other"),  # the router of a mixture of experts
    # GPT-2, with and without the model's prefix
    "transformer.wte.weight": (None, "embed"),
    "wpe.weight": (None, "embed"),
    "transformer.h.10.attn.c_attn.weight": (10, "qkv"),
    "h.2.attn.c_proj.bias": (2, "o"),
    "h.2.mlp.c_fc.weight": (2, "up"),
    "h.2.mlp.c_proj.weight": (2, "down"),
    "h.2.ln_1.weight": (2, "norm"),
    "transformer.ln_f.bias": (None, "norm"),
    # Phi-2, GPT-J, Falcon, GPT-NeoX, InternLM2, BERT
    "model.layers.4.self_attn.dense.weight": (4, "o"),
    "transformer.h.4.mlp.fc_in.weight": (4, "up"),
    "transformer.h.4.mlp.fc_out.weight": (4, "down"),
    "transformer.h.4.self_attention.query_key_value.weight": (4, "qkv"),
    "transformer.h.4.self_attention.dense.weight": (4, "o"),
    "gpt_neox.layers.4.attention.dense.bias": (4, "o"),
    "gpt_neox.layers.4.mlp.dense_4h_to_h.weight": (4, "down"),
    "embed_out.weight": (None, "lm_head"),
    "model.layers.4.attention.wqkv.weight": (4, "qkv"),
    "output.weight": (None, "lm_head"),
    "bert.encoder.layer.4.attention.output.dense.weight": (4, "o"),
    "bert.encoder.layer.4.attention.output.LayerNorm.weight": (4, "norm"),
    "bert.encoder.layer.4.output.dense.weight": (4, "down"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_layer_and_kind_of_a_name(name: str) -> None:
    assert (layer_index(name), matrix_kind(name)) == NAMES[name]


def test_groups_partition_the_weights() -> None:
    changes = {name: Change(numel=2**place, num_within=place) for place, name in enumerate(NAMES)}
    found = grouped(**changes)
    layers, kinds = found.layers, found.kinds
    assert list(layers) == [0, 1, 2, 3, 4, 10, 11, None]
    assert list(kinds)[:3] == ["embed", "q", "k"] and list(kinds)[-1] == "other"
    for key, groups in ((0, layers), (1, kinds)):
        for value, total in groups.items():
            assert total.numel == sum(changes[name].numel for name, one in NAMES.items() if one[key] == value)
    assert found.total.numel == 2 ** len(NAMES) - 1 and found.tensors == changes
    numbers = SparsityResult(found, LargestChanges(), {}).numbers()
    assert [row["name"] for row in numbers["tensors"]] == list(NAMES)
    cells = dict.fromkeys((kind, layer) for layer, kind in NAMES.values())
    assert [(row["kind"], row["layer"]) for row in numbers["cells"]] == list(cells)


def test_headlines_have_the_numbers() -> None:
    base, tuned = planted()
    changes = {
        "h.0.attn.c_attn.weight": compare_tensors(base, tuned, ATOL),
        "wte.weight": compare_tensors(base, base, ATOL),
    }
    where, rules = headlines(grouped(**changes), ATOL)
    assert where.startswith("1.25% of the 400 weights changed bit for bit, none of them as bfloat16")
    assert where.endswith("most in qkv (2.50%), least in embed (0.00%).")
    assert "99.50% moved by no more than 1e-05" in rules and "98.75% bit for bit" in rules
    text = size_section(SparsityResult(grouped(**changes), LargestChanges(), {})).text
    assert "largest change of a weight is 2.00e-05. Of the 5 weights" in text and "0.00% moved by exactly one" in text


def test_changes_from_exact_zero_are_counted_by_themselves() -> None:
    base = torch.tensor([0.0, 0.0, 1.0, 2.0], dtype=torch.bfloat16)
    tuned = torch.tensor([1e-3, -0.0, 1.0078125, 2.0], dtype=torch.bfloat16)
    change = compare_tensors(base, tuned)
    # 0 to 1e-3 is 15,003 steps, and 0 to -0 none
    assert (change.num_from_zero, change.ulps, change.num_below_step, change.num_bit_changed) == (1, (1,), 1, 3)
    assert "1 of the 3 changed weights were exactly 0 before" in headlines(grouped(w=change), ATOL)[2]
