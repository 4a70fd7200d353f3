"""Row and column profiles: planted stripes, the Gini coefficient against its definition and drawn masks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.measures.group_tables import picture
from ssrctl.measures.maths.averages import mean, ratio
from ssrctl.measures.maths.row_column_counts import (
    CoarseMap,
    Concentration,
    Profile,
    agreement,
    coarse_map,
    concentration,
    expected_gini,
    gini,
    mean_concentration,
    profile,
    rank_correlation,
    stability,
    stacked,
)


def drawn(shape: tuple[int, int], share: float, seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def known(changed: torch.Tensor) -> Profile:
    found = profile(changed)
    assert found is not None
    return found


def plain_gini(counts: list[int]) -> float:
    """The definition, by two loops."""
    return sum(abs(a - b) for a in counts for b in counts) / (2 * len(counts) * sum(counts))


def plain_ranks(values: list[int]) -> list[float]:
    return [sum(b < a for b in values) + (sum(b == a for b in values) + 1) / 2 for a in values]


@pytest.mark.parametrize("shape", [(1, 1), (5, 70), (70, 5), (33, 48), (3, 1_100_000)])
def test_counts_are_those_of_numpy(shape: tuple[int, int]) -> None:
    changed = drawn(shape, 0.3, seed=shape[0])
    found = known(changed)
    assert found.rows.tolist() == changed.numpy().sum(axis=1).tolist()
    assert found.columns.tolist() == changed.numpy().sum(axis=0).tolist()
    assert found.num_changed == int(changed.sum())


def test_only_matrices_have_profiles() -> None:
    for shape in ((), (6,), (2, 3, 4)):
        assert profile(torch.ones(shape, dtype=torch.bool)) is None


def test_blocks_of_rows_add_up() -> None:
    changed = drawn((21, 9), 0.4, seed=1)
    whole, parts = known(changed), stacked([profile(part) for part in changed.split(8)])
    assert parts is not None
    assert torch.equal(whole.rows, parts.rows) and torch.equal(whole.columns, parts.columns)
    assert stacked([None, None]) is None


# --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20))
def test_gini_is_its_definition(counts: list[int]) -> None:
    found = gini(counts)
    if not sum(counts):
        assert found is None
        return
    assert found == pytest.approx(plain_gini(counts), abs=1e-12)
    assert found is not None and -1e-12 <= found <= 1 - 1 / len(counts) + 1e-12


def test_gini_of_even_and_of_one_sided_counts() -> None:
    assert gini([3] * 8) == 0.0
    assert gini([0] * 7 + [5]) == pytest.approx(7 / 8, abs=1e-15)
    assert gini([]) is None and gini([0, 0]) is None


@pytest.mark.parametrize(
    ("shape", "count"), [((64, 128), 1600), ((128, 64), 40), ((16, 300), 4700), ((8, 8), 3), ((2, 40), 20)]
)
def test_expected_gini_is_that_of_drawn_masks(shape: tuple[int, int], count: int) -> None:
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(250):
        changed = torch.zeros(shape, dtype=torch.bool)
        changed.view(-1)[torch.randperm(changed.numel(), generator=generator)[:count]] = True
        found.append(gini(known(changed).rows))
    error = np.std(found) / np.sqrt(len(found))
    # the dependence of lines is exact for squares only: a few per cent of the value where lines or changes are few
    assert expected_gini(*shape, count) == pytest.approx(np.mean(found), abs=4 * error + 0.03 * np.mean(found))


def test_expected_gini_at_the_ends() -> None:
    assert expected_gini(4, 5, 0) is None
    assert expected_gini(4, 5, 20) == pytest.approx(0.0, abs=1e-12)
    assert expected_gini(1, 5, 3) == 0.0
    assert expected_gini(7, 5, 1) == pytest.approx(6 / 7, rel=0.1)  # exactly 6/7 for a single change
    with pytest.raises(ValueError, match="21 of 20"):
        expected_gini(4, 5, 21)


def test_planted_stripes_are_concentrated_along_one_side_only() -> None:
    changed = drawn((60, 80), 0.02, seed=2)
    changed[::6] |= drawn((10, 80), 0.8, seed=3)
    found = concentration(known(changed))
    assert found.row_gini is not None and found.column_gini is not None
    # a sixth of the rows has nine tenths of the changes
    assert found.row_gini > 0.7 and found.expected_row_gini == pytest.approx(0.145, abs=0.001)
    # few rows are left to differ in, so that columns are more even than by chance
    assert 0 < found.column_gini < (found.expected_column_gini or 0)


def test_means_leave_out_what_is_undefined() -> None:
    assert mean([None, 1.0, 3.0]) == 2.0 and mean([None]) is None and mean([]) is None
    unchanged = concentration(Profile(torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)))
    assert set(dataclasses.astuple(unchanged)) == {None}
    one = Concentration(row_gini=0.5, expected_row_gini=0.1, column_gini=0.2, expected_column_gini=0.1)
    assert mean_concentration([unchanged, one]) == one
    assert mean_concentration([]) == unchanged
    assert ratio(1, 4) == 0.25 and ratio(None, 4) is None and ratio(1, 0) is None and ratio(1, None) is None


# --------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=15))
def test_rank_correlation_is_that_of_mean_ranks(pairs: list[tuple[int, int]]) -> None:
    a, b = ([pair[side] for pair in pairs] for side in (0, 1))
    found = rank_correlation(torch.tensor(a), torch.tensor(b))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert found is None
        return
    assert found == pytest.approx(np.corrcoef(plain_ranks(a), plain_ranks(b))[0, 1], abs=1e-9)


def test_rank_correlation_knows_order_alone() -> None:
    rising = torch.tensor([0, 1, 5, 200])
    assert rank_correlation(rising, rising**2 + 3) == pytest.approx(1.0, abs=1e-12)
    assert rank_correlation(rising, -rising) == pytest.approx(-1.0, abs=1e-12)
    assert rank_correlation(rising[:2], rising[:2]) is None
    assert rank_correlation(rising[:0], rising[:0]) is None
    with pytest.raises(ValueError, match="4 and 2 lines"):
        rank_correlation(rising, rising[:2])


def test_planted_stripes_stay_while_density_grows() -> None:
    """Rows with their own rates, which grow together: the order of rows stays, that of columns is chance."""
    rates = torch.linspace(0.01, 0.2, 100).unsqueeze(1)
    series = [known(torch.rand(100, 400, generator=torch.Generator().manual_seed(t)) < t * rates) for t in (1, 2, 3)]
    rows, columns = stability(series)
    assert all(one is not None and one > 0.95 for one in rows)
    assert rows[-1] == pytest.approx(1.0, abs=1e-12) and columns[-1] == pytest.approx(1.0, abs=1e-12)
    # 400 columns: a standard deviation of 0.05 by chance
    assert all(one is not None and abs(one) < 0.2 for one in columns[:-1])
    assert stability([]) == ([], [])


def test_agreement_is_the_mean_over_pairs() -> None:
    runs = [known(drawn((30, 20), 0.3, seed)) for seed in range(3)]
    pairs = [rank_correlation(runs[i].rows, runs[j].rows) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert agreement(runs)[0] == pytest.approx(np.mean([one for one in pairs if one is not None]))
    assert agreement(runs[:1]) == agreement([]) == (None, None)


# --------------------------------------------------------------------------------------------------


def test_small_pictures_hold_the_shares_of_blocks() -> None:
    changed = torch.zeros(4, 6, dtype=torch.bool)
    changed[:2, 3:] = True
    assert coarse_map(changed, 2) == CoarseMap([0, 2], [0, 3], [[0.0, 1.0], [0.0, 0.0]])
    whole = coarse_map(changed)
    assert whole.shares == changed.double().tolist() and whole.columns == [0, 1, 2, 3, 4, 5]
    assert coarse_map(changed.double() / 2, 1).shares == [[0.125]]
    uneven = coarse_map(torch.eye(5, dtype=torch.bool), 2)
    assert uneven.rows == [0, 3] and uneven.shares == [[3 / 9, 0.0], [0.0, 2 / 4]]
    figure = picture("t", uneven, "")
    assert figure.centre == 0.0 and figure.marginals and figure.row_labels == ["0", "3"]
