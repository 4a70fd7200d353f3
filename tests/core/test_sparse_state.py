"""State for touched coordinates, compared with a Python dict."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.core import sparse_state
from ssrctl.core.bits import bits_from_indices
from ssrctl.core.sparse_state import SparseState

FIELDS = {"remainder": torch.int16, "exp_avg": torch.float32}


def sizes_and_rounds(n):
    return st.tuples(st.just(n), st.lists(st.sets(st.integers(0, n - 1)) if n else st.just(set()), max_size=6))


rounds_of_sets = st.integers(0, 300).flatmap(sizes_and_rounds)


def ascending(chosen):
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def check(state, expected):
    """``expected``: coordinate -> (remainder, exp_avg), a plain dict."""
    order = sorted(expected)
    assert state.count == len(order)
    assert state.indices().tolist() == order
    assert state.fields["remainder"].tolist() == [expected[i][0] for i in order]
    assert state.fields["exp_avg"].tolist() == [expected[i][1] for i in order]
    assert {name: values.dtype for name, values in state.fields.items()} == FIELDS
    assert torch.equal(state.bits, bits_from_indices(ascending(order), state.numel))


@given(rounds_of_sets)
def test_insertion_keeps_what_is_there_and_adds_zeros(case):
    numel, rounds = case
    state, expected = SparseState(numel, FIELDS), {}
    for number, chosen in enumerate(rounds, start=1):
        positions, is_new = state.insert(ascending(chosen))
        assert is_new.tolist() == [i not in expected for i in sorted(chosen)]
        for i in chosen:
            expected.setdefault(i, (0, 0.0))
        assert positions.tolist() == [sorted(expected).index(i) for i in sorted(chosen)]
        check(state, expected)
        state.fields["remainder"][positions] += ascending(chosen).to(torch.int16) - 150
        state.fields["exp_avg"][positions] += 0.5 * number
        for i in chosen:
            expected[i] = (expected[i][0] + i - 150, expected[i][1] + 0.5 * number)
        check(state, expected)


@given(rounds_of_sets)
def test_positions_of_what_is_there_in_any_order(case):
    numel, rounds = case
    state, touched = SparseState(numel, FIELDS), sorted(set().union(*rounds))
    state.insert(ascending(touched))
    backwards = torch.tensor(touched[::-1], dtype=torch.int64)
    assert state.positions(backwards).tolist() == list(range(len(touched)))[::-1]
    assert state.contains(torch.arange(numel)).tolist() == [i in touched for i in range(numel)]
    absent = [i for i in range(numel) if i not in touched]
    if absent:
        with pytest.raises(ValueError, match=f"1 of {len(touched) + 1} coordinates were never touched"):
            state.positions(torch.tensor([*touched, absent[0]]))


@given(rounds_of_sets)
def test_saved_and_loaded_state_goes_on_the_same(case):
    numel, rounds = case
    state = SparseState(numel, FIELDS)
    for number, chosen in enumerate(rounds):
        loaded = SparseState.from_tensors(numel, state.tensors())
        for each in (state, loaded):
            positions, _ = each.insert(ascending(chosen))
            each.fields["exp_avg"][positions] += number + 0.25
        assert loaded.tensors().keys() == state.tensors().keys() == {"bits", "remainder", "exp_avg"}
        for name, values in state.tensors().items():
            assert torch.equal(values, loaded.tensors()[name])
            assert values.dtype == loaded.tensors()[name].dtype


def test_answers_do_not_depend_on_the_chunk(monkeypatch):
    chosen = torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:1500].sort().values
    whole, cut = SparseState(5000, FIELDS), SparseState(5000, FIELDS)
    expected, _ = whole.insert(chosen)
    monkeypatch.setattr(sparse_state, "CHUNK", 7)
    assert torch.equal(cut.insert(chosen)[0], expected)
    assert torch.equal(cut.indices(), chosen)


def test_every_bit_of_a_word_has_its_rank():
    """Bit 63 is the sign of the words that the bits are counted in."""
    for chosen in (range(192), range(63, 192, 64), (62, 63, 64, 127, 128, 191)):
        state = SparseState(192, {})
        state.insert(ascending(chosen))
        assert state.positions(ascending(chosen)).tolist() == list(range(len(chosen)))
        assert state.indices().tolist() == sorted(chosen)


def test_memory_is_the_bits_and_the_fields():
    state = SparseState(1000, FIELDS)
    assert state.num_bytes == 128  # 1000 bits in whole words
    state.insert(torch.tensor([1, 999]))
    assert state.num_bytes == 128 + 2 * (2 + 4)
    assert state.bits.shape == (125,)


def test_loaded_state_is_a_copy():
    state = SparseState(10, FIELDS)
    state.insert(torch.tensor([3]))
    tensors = state.tensors()
    loaded = SparseState.from_tensors(10, tensors)
    loaded.insert(torch.tensor([1]))
    loaded.fields["exp_avg"].fill_(2.0)
    check(state, {3: (0, 0.0)})


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([3, 3], ValueError, "the 2 indices are not strictly ascending"),
        ([5, 4], ValueError, "the 2 indices are not strictly ascending"),
        ([-1, 2], IndexError, "flat index -1 is outside a tensor of 10 elements"),
        ([2, 10], IndexError, "flat index 10 is outside a tensor of 10 elements"),
    ],
)
def test_anything_but_ascending_indices_inside_is_refused(indices, error, message):
    state = SparseState(10, FIELDS)
    with pytest.raises(error, match=message):
        state.insert(torch.tensor(indices))
    check(state, {})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"bits": torch.zeros(3, dtype=torch.uint8)}, r"\[3\], a tensor of 10 coordinates has 2 bytes"),
        ({"bits": torch.zeros(2, dtype=torch.int32)}, "bits are torch.int32"),
        ({"bits": torch.tensor([0, 4], dtype=torch.uint8)}, "a bit is set beyond the 10 coordinates"),
        ({"exp_avg": torch.zeros(2)}, r"exp_avg has shape \[2\], 1 coordinates were touched"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(broken, message):
    state = SparseState(10, FIELDS)
    state.insert(torch.tensor([3]))
    with pytest.raises(ValueError, match=message):
        SparseState.from_tensors(10, state.tensors() | broken)


def test_no_field_takes_the_name_of_the_bits():
    with pytest.raises(ValueError, match="bits"):
        SparseState(10, {"bits": torch.float32})


@pytest.mark.gpu
def test_on_a_gpu():
    chosen = [torch.randperm(100_000, generator=torch.Generator().manual_seed(s))[:9000].sort().values for s in (0, 1)]
    here, there = SparseState(100_000, FIELDS), SparseState(100_000, FIELDS, "cuda")
    for indices in chosen:
        expected, new = here.insert(indices)
        positions, is_new = there.insert(indices.cuda())
        assert torch.equal(positions.cpu(), expected)
        assert torch.equal(is_new.cpu(), new)
        here.fields["exp_avg"][expected] += indices
        there.fields["exp_avg"][positions] += indices.cuda()
    for name, values in here.tensors().items():
        assert torch.equal(there.tensors()[name].cpu(), values)
