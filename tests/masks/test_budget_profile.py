import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ssrctl.configs import ModelConfig, SamplingConfig
from ssrctl.core.bits import bits_from_indices
from ssrctl.core.losses import step_policy_loss
from ssrctl.errors import UserError
from ssrctl.io.problems import Problem
from ssrctl.io.records import Rollout, StepSpan
from ssrctl.masks.budget_profile import (
    StepMass,
    claim_masses,
    mean_curves,
    problem_masses,
    signal_units,
    traces_batch,
)
from ssrctl.models.loading import LoadedModel, load_model
from ssrctl.sampling.groups import prepare_prompts, sample_groups
from ssrctl.text.prompts import PromptFormat
from ssrctl.training.step_gradients.batch import group_batch
from ssrctl.training.unit_gradients import GroupBatch, make_batch, response_logprobs


def slow_masses(many: list[dict[str, torch.Tensor]], claim: int, protected: set[tuple[str, int]]) -> list[StepMass]:
    """One python dict per gradient, sorted."""
    taken, found = set(protected), []
    for step, gradient in enumerate(many):
        flat = {(n, i): v for n, g in gradient.items() for i, v in enumerate(g.flatten().tolist())}
        free = sorted((key for key in flat if key not in taken), key=lambda key: -abs(flat[key]))
        chosen = free[:claim]
        taken |= set(chosen)
        whole = sum(v * v for v in flat.values())
        energies = [sum(flat[key] ** 2 for key in keys) / whole for keys in (free, chosen)]
        unprotected = sum(v * v for key, v in flat.items() if key not in protected)
        share = energies[0] * whole / unprotected
        found.append(StepMass(step, sum(abs(flat[key]) for key in chosen), *energies, share))
    return found


def assert_masses(found: list[StepMass], expected: list[StepMass], rel: float = 1e-5) -> None:
    assert [one.step for one in found] == [one.step for one in expected]
    for one, other in zip(found, expected, strict=True):
        # Squares are float32 in the one and float64 in the other.
        assert one.mass == pytest.approx(other.mass, rel=rel)
        assert one.energy_available == pytest.approx(other.energy_available, rel=rel)
        assert one.energy_claimed == pytest.approx(other.energy_claimed, rel=rel)
        assert one.share == pytest.approx(other.share, rel=rel)


def no_bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: torch.zeros(-(-p.numel() // 8), dtype=torch.uint8) for n, p in model.named_parameters()}


@pytest.mark.parametrize("claim", [1, 7, 40])
def test_claims_match_a_sorted_reference(claim: int) -> None:
    generator = torch.Generator().manual_seed(claim)
    many = [{"a": torch.randn(6, 9, generator=generator), "b": torch.randn(30, generator=generator)} for _ in range(4)]
    bits = {"a": bits_from_indices(torch.tensor([0, 8, 53]), 54), "b": bits_from_indices(torch.tensor([29]), 30)}
    before = {name: packed.clone() for name, packed in bits.items()}
    found = list(claim_masses(iter(enumerate(many)), claim, bits))
    assert_masses(found, slow_masses(many, claim, {("a", 0), ("a", 8), ("a", 53), ("b", 29)}))
    assert all(torch.equal(before[name], bits[name]) for name in bits)


def test_the_same_gradient_again_finds_only_what_is_left() -> None:
    gradient = {"a": torch.tensor([4.0, -3.0, 2.0, 1.0])}
    found = list(claim_masses(iter([(0, gradient), (1, gradient)]), 2, {"a": torch.zeros(1, dtype=torch.uint8)}))
    assert found == [StepMass(0, 7.0, 1.0, 25 / 30, 1.0), StepMass(1, 3.0, 5 / 30, 5 / 30, 5 / 30)]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def batch(model: LlamaForCausalLM) -> GroupBatch:
    generator = torch.Generator().manual_seed(1)
    responses = [torch.randint(23, (length,), generator=generator).tolist() for length in (7, 5, 6)]
    steps = [[0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1], [0, 0, 0, 1, 2, 2]]
    nothing = [torch.zeros(len(ids)) for ids in responses]
    made = make_batch([3, 4, 5], responses, nothing, steps, pad_token_id=0, device=torch.device("cpu"))
    with torch.no_grad():
        now = response_logprobs(model, made, 1.0)
    return GroupBatch(made.input_ids, made.attention_mask, made.prompt_length, now, made.step_ids)


ADVANTAGES = [[1.0, -0.5, 0.3], [-1.0, None], [0.5, 0.7, -1.1]]


def dense_gradient(model: LlamaForCausalLM, batch: GroupBatch, step: int) -> dict[str, torch.Tensor]:
    column = [row[step] if step < len(row) and row[step] is not None else math.nan for row in ADVANTAGES]
    logprobs = response_logprobs(model, batch, 1.0)
    loss = step_policy_loss(logprobs, batch.old_logprobs, batch.step_ids, step, torch.tensor(column).double()).loss
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True), strict=True))


def test_problem_masses_are_those_of_separate_backward_passes(model: LlamaForCausalLM, batch: GroupBatch) -> None:
    found = problem_masses(model, batch, ADVANTAGES, claim=50, protected=no_bits(model), max_steps=8, temperature=1.0)
    expected = slow_masses([dense_gradient(model, batch, step) for step in range(3)], 50, set())
    # float32 sums in another order; a near-tie at a threshold may swap coordinates of equal size.
    assert_masses(found, expected, rel=1e-4)
    assert all(p.grad is None for p in model.parameters())
    assert (
        problem_masses(model, batch, ADVANTAGES, claim=50, protected=no_bits(model), max_steps=2, temperature=1.0)
        == found[:2]
    )


def test_a_step_without_signal_is_left_out_and_claims_nothing(model: LlamaForCausalLM, batch: GroupBatch) -> None:
    silent = [[row[0], 0.0 if row[1] is not None else None, *row[2:]] for row in ADVANTAGES]
    assert [unit.steps for unit in signal_units(silent, 8)] == [(0,), (2,)]
    found = problem_masses(model, batch, silent, claim=50, protected=no_bits(model), max_steps=8, temperature=1.0)
    gradients = [dense_gradient(model, batch, step) for step in (0, 2)]
    expected = slow_masses(gradients, 50, set())
    assert [one.step for one in found] == [0, 2]
    assert found[1].mass == pytest.approx(expected[1].mass, rel=1e-4)


def test_a_gradient_that_is_nan_is_a_user_error(model: LlamaForCausalLM, batch: GroupBatch) -> None:
    broken = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    with pytest.raises(UserError, match="cannot be used"):
        problem_masses(broken, batch, ADVANTAGES, claim=5, protected=no_bits(broken), max_steps=8, temperature=1.0)


def test_protected_coordinates_do_not_count_towards_the_share() -> None:
    gradient = {"a": torch.tensor([5.0, 4.0, -3.0, 0.0])}
    protected = {"a": bits_from_indices(torch.tensor([0]), 4)}
    found = list(claim_masses(iter([(0, gradient), (1, gradient)]), 1, protected))
    assert found == [StepMass(0, 4.0, 25 / 50, 16 / 50, 1.0), StepMass(1, 3.0, 9 / 50, 9 / 50, 9 / 25)]
    only = {"a": torch.tensor([5.0, 0.0, 0.0, 0.0])}  # all of it on the protected coordinate
    assert [one.share for one in claim_masses(iter([(0, only)]), 1, protected)] == [None]


def mass(step: int, value: float, share: float | None = 1.0) -> StepMass:
    return StepMass(step, value, 0.75, 0.5, share)


def test_mean_curves_by_hand() -> None:
    found = mean_curves(
        [
            [mass(0, 2.0), mass(1, 1.0, 0.8), mass(2, 1.0, 0.3)],
            [mass(0, 10.0), mass(1, 9.0, 0.6)],
            [mass(0, 4.0), mass(2, 1.0, None)],  # its step 1 had no signal: not counted, rather than counted as 0
            [],
        ]
    )
    # step 1: mean of 2, 10, 4 is 16/3; step 2: of 1, 9 is 5; step 3: of 1, 1 is 1
    assert found.mass.mean == pytest.approx([1.0, 15 / 16, 3 / 16])
    assert found.mass.std == pytest.approx([(104 / 9) ** 0.5 * 3 / 16, 4 * 3 / 16, 0.0])
    assert found.mass.num_problems == [3, 2, 2]
    assert found.share.mean == pytest.approx([1.0, 0.7, 0.3])
    # of 0.8 and 0.6: the sample standard deviation is 0.2 / sqrt(2), over sqrt(2) again
    assert found.share.standard_error == [0.0, pytest.approx(0.1), None]
    assert found.share.num_problems == [3, 2, 1]
    assert found.energy_available == [0.75] * 3 and found.energy_claimed == [0.5] * 3


def test_mean_curves_end_before_a_gap() -> None:
    found = mean_curves([[mass(0, 1.0), mass(1, 1.0, None), mass(2, 1.0), mass(4, 1.0)]])
    assert found.mass.mean == [1.0] * 3 and found.share.mean == [1.0]


def test_mean_curves_of_nothing() -> None:
    with pytest.raises(ValueError, match="none of 1 problems"):
        mean_curves([[mass(1, 1.0)]])
    with pytest.raises(ValueError, match="none of 1 problems"):
        mean_curves([[mass(0, 1.0, None)]])


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model(ModelConfig(device="cpu"))


@pytest.mark.parametrize("stop", [[], ["="]])
def test_stored_traces_give_the_batch_that_sampling_gave(tiny: LoadedModel, stop: list[str]) -> None:
    problem = Problem(id="q1", question="48*6-2*9+2=?", answer="76")
    sampling = SamplingConfig(max_new_tokens=48, stop=stop)
    prompts, _ = prepare_prompts(tiny, [problem], PromptFormat(), sampling.max_new_tokens)
    group = sample_groups(tiny, prompts, sampling, num_generations=6, seed=0)[0]
    assert any(rollout.extra.get("ended_by_stop") for rollout in group.rollouts) == bool(stop)
    sampled, stored = group_batch(tiny, group), traces_batch(tiny, group.rollouts, sampling.temperature)
    assert torch.equal(sampled.input_ids, stored.input_ids)
    assert torch.equal(sampled.attention_mask, stored.attention_mask)
    assert torch.equal(sampled.step_ids, stored.step_ids)
    # One pass with a cache, one without: the same numbers up to float32 rounding.
    torch.testing.assert_close(
        sampled.old_logprobs[sampled.known], stored.old_logprobs[sampled.known], rtol=0, atol=1e-4
    )


def rollout(identity: str, prompt: str, response: str) -> Rollout:
    return Rollout(id=identity, prompt=prompt, response=response, steps=[StepSpan(start=0, end=len(response))])


def test_traces_of_different_prompts_in_one_group(tiny: LoadedModel) -> None:
    with pytest.raises(UserError, match="q/1 and q/0 have different prompts"):
        traces_batch(tiny, [rollout("q/0", "1+2=?\n", "03"), rollout("q/1", "1+3=?\n", "04")], 1.0)


def test_traces_beyond_the_context(tiny: LoadedModel) -> None:
    with pytest.raises(UserError, match="q/0 has 206 tokens, the model's context is 128"):
        traces_batch(tiny, [rollout("q/0", "1+2=?\n", "0" * 200)], 1.0)
