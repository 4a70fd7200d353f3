"""Questions whose responses are split: the parts' gradients sum to that of the whole, unit by unit."""

import pytest
import torch
from reference.unit_gradients import CASES, assert_close, build, taken

from ssrctl.core.losses import response_weights
from ssrctl.distributed.dealing import deal_questions
from ssrctl.training.step_gradients.parts import QuestionPart
from ssrctl.training.unit_gradients import unit_gradients


@pytest.fixture(scope="module")
def qwen():
    return build("qwen3")


@pytest.mark.parametrize("kind", ["step", "grpo"])
@pytest.mark.parametrize("method", ["kept", "chunked"])
@pytest.mark.parametrize("case", [case for case in CASES.values() if len(case.steps) > 1])
def test_the_parts_sum_to_the_whole(qwen, case, method, kind) -> None:
    case = case.near(qwen)
    batch = case.batch()
    weights = response_weights(kind, torch.tensor([len(row) for row in case.steps]), longest=9, batch_tokens=5.0)
    settings = {"method": method, "level": "token", "beta": 0.0}
    whole = {
        made.unit.steps: (made, taken(qwen))
        for made in unit_gradients(qwen, batch, case.units, token_weights=weights, **settings)
    }
    sums = {steps: ([0.0, 0, 0], {}) for steps in whole}
    lengths = [float(len(row)) for row in case.steps]
    (shares,) = zip(*deal_questions([lengths], len(lengths) - (len(lengths) > 2)), strict=True)
    assert sorted(row for share in shares for row in share.responses) == list(range(len(lengths)))
    for share in shares:
        part = QuestionPart.of(batch, case.units, share.responses)
        assert [unit.steps for unit in part.units] == list(whole)
        for made in unit_gradients(
            qwen,
            part.batch,
            part.own_units,
            token_weights=None if weights is None else weights[share.responses],
            num_responses=part.num_responses,
            **settings,
        ):
            counts, gradient = sums[made.unit.steps]
            for place, value in enumerate((made.loss, made.num_terms, made.num_clipped)):
                counts[place] += value
            for name, found in taken(qwen).items():
                gradient[name] = gradient[name] + found if name in gradient else found
    for steps, (made, gradient) in whole.items():
        (loss, *counts), summed = sums[steps]
        assert loss == pytest.approx(made.loss, rel=1e-6) and counts == [made.num_terms, made.num_clipped]
        assert_close(summed, gradient)
