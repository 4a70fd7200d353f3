"""What says how to sample is refused beside given responses."""

from pathlib import Path

import pytest

from ssrctl.configs import EvalConfig
from ssrctl.errors import UserError


@pytest.mark.parametrize(
    "changes", [{"model": "x"}, {"num_samples": 2}, {"temperature": 0.5}, {"limit": 3}, {"checkpoint": Path("c")}]
)
def test_settings_of_sampling_are_refused_beside_responses(changes):
    with pytest.raises(UserError, match="would have no effect"):
        EvalConfig(responses="r.jsonl", **changes)
    EvalConfig(**changes)
    EvalConfig(responses="r.jsonl", dataset="d.jsonl", baseline=Path("b"), confidence=0.9, answer_column="a")


def test_one_stdin():
    with pytest.raises(UserError, match="stdin"):
        EvalConfig(responses="-", dataset="-")
