import math

import pytest
import torch

from ssrctl.core.kl import kl_both_ways


def slow_kl(logits_p: list[float], logits_q: list[float]) -> float:
    """Straight from the definition, in plain python."""
    p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (logits_p, logits_q))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_matches_the_definition_in_each_direction() -> None:
    p, q = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)) * 3
    forward, backward = kl_both_ways(p, q)
    for row in range(5):
        # Both sides are float64 on logits of size 10, so rounding stays far below 1e-9.
        assert float(forward[row]) == pytest.approx(slow_kl(p[row].tolist(), q[row].tolist()), rel=1e-9)
        assert float(backward[row]) == pytest.approx(slow_kl(q[row].tolist(), p[row].tolist()), rel=1e-9)
    assert not torch.allclose(forward, backward)


def test_far_apart_distributions_do_not_saturate() -> None:
    p, q = torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1000.0]])
    assert [float(x) for x in kl_both_ways(p, q)] == [1000.0, 1000.0]


def test_probability_zero() -> None:
    infinity = float("inf")
    p, q = torch.tensor([[0.0, -infinity]]), torch.tensor([[0.0, 0.0]])
    forward, backward = kl_both_ways(p, q)
    assert float(forward) == pytest.approx(math.log(2))
    assert float(backward) == infinity


@pytest.mark.parametrize("bad", [[float("nan"), 0.0], [float("inf"), 0.0], [float("-inf")] * 2])
def test_no_distribution_gives_nan_at_that_position_only(bad: list[float]) -> None:
    p, q = torch.tensor([bad, [1.0, 2.0]]), torch.zeros(2, 2)
    for value in (*kl_both_ways(p, q), *kl_both_ways(q, p)):
        assert value.isnan().tolist() == [True, False]


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="expected two"):
        kl_both_ways(torch.zeros(2, 3), torch.zeros(3, 3))
