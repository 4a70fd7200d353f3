"""Log-probabilities and per-unit gradients against fresh forward passes, one response at a time."""

import pytest
import torch
from reference.unit_gradients import CASES, assert_close, build, taken

from ssrctl.core.token_logprobs import Projection, token_logprobs
from ssrctl.core.units import Unit
from ssrctl.errors import UserError
from ssrctl.training.step_gradients.batch import response_values
from ssrctl.training.step_gradients.head import HeadSettings, logit_form
from ssrctl.training.unit_gradients import NonFiniteLoss, make_batch, response_logprobs, trainable, unit_gradients

FORMS = {
    "gemma2": {"final_logit_softcapping": 0.5},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
}
PROMPT = [5, 9, 200, 31]
RESPONSES = [[40, 41, 42, 43, 44, 45, 1], [50, 51, 52], [60, 61, 62, 63, 64]]
STEPS = [[0, 0, 1, 1, 1, 2, 2], [0, 0, 1], [0, 1, 1, 2, 2]]
ADVANTAGES = [[0.7, -1.3, 0.4], [-0.2, 0.9, None], [None, 0.6, -1.1]]
OFFSETS = [0.02, -0.01, 0.05]  # what the policy moved since sampling, per response


def logprobs_alone(model, response, temperature=1.0, prompt=PROMPT):
    """Without a batch, padding or gather: one response, one token after the other."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0] / temperature
    rows = logits.log_softmax(-1)
    return torch.stack([rows[len(prompt) + place - 1, token] for place, token in enumerate(response)])


def batch_of(responses, steps, old=None, prompt=PROMPT):
    old = [torch.zeros(len(response)) for response in responses] if old is None else old
    return make_batch(prompt, responses, old, steps, pad_token_id=0, device=torch.device("cpu"))


@pytest.fixture
def moved_batch(tiny_model):
    """Old log-probabilities a little off those of now, so that every ratio differs from 1."""
    with torch.no_grad():
        old = [logprobs_alone(tiny_model, r) - shift for r, shift in zip(RESPONSES, OFFSETS, strict=True)]
    return batch_of(RESPONSES, STEPS, old)


def units_of(advantages=ADVANTAGES, groups=((0,), (1,), (2,))):
    columns = [tuple(row[step] for row in advantages) for step in range(3)]
    return [Unit(steps, 0.01, tuple(columns[step] for step in steps)) for steps in groups]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def clear(model):
    for parameter in model.parameters():
        parameter.grad = None


def close(found, expected, rtol=1e-4):
    """Relative to the tensor's largest entry: float32 sums in another order differ by a few 1e-6 of it."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (found[name] - wanted).abs().max() <= rtol * wanted.abs().max() + 1e-8, name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_agree_with_each_response_alone(tiny_model, temperature):
    with torch.no_grad():
        found = response_logprobs(tiny_model, batch_of(RESPONSES, STEPS), temperature)
        assert found.dtype == torch.float32 and found.shape == (3, 7)
        for row, response in enumerate(RESPONSES):
            expected = logprobs_alone(tiny_model, response, temperature)
            # float32 logits of size 10 carry errors of about 1e-6 each.
            torch.testing.assert_close(found[row, : len(response)], expected, rtol=0, atol=2e-5)


def test_right_padding_changes_nothing(tiny_model):
    with torch.no_grad():
        padded = response_logprobs(tiny_model, batch_of(RESPONSES, STEPS), 1.0)
        for row, response in enumerate(RESPONSES):
            alone = response_logprobs(tiny_model, batch_of([response], [STEPS[row]]), 1.0)
            torch.testing.assert_close(padded[row, : len(response)], alone[0], rtol=0, atol=2e-5)


def test_logprobs_of_some_responses_up_to_some_token(tiny_model):
    batch = batch_of(RESPONSES, STEPS)
    with torch.no_grad():
        whole = response_logprobs(tiny_model, batch, 0.7)
        part = response_logprobs(tiny_model, batch, 0.7, rows=torch.tensor([0, 2]), end=5)
        assert part.shape == (2, 5)
        torch.testing.assert_close(part, whole[[0, 2], :5], rtol=0, atol=2e-5)
        assert response_logprobs(tiny_model.double(), batch, 0.7).dtype == torch.float64


@pytest.mark.parametrize("chunk_tokens", [1, 1000])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "cohere", "gpt2", "unknown"])
def test_values_and_gradients_without_logits_are_those_of_the_logits(kind, chunk_tokens):
    """Soft caps, factors and biases, in blocks of one or all of the vocabulary; an unknown head keeps its logits."""
    model = build("llama" if kind == "unknown" else kind, **FORMS.get(kind, {}))
    if kind == "unknown":
        model.lm_head.register_forward_hook(lambda module, inputs, output: output + output.roll(1, -1))
    case = CASES["ragged"]
    batch, settings = case.batch(), HeadSettings(0.7, chunk_tokens, with_entropy=True)
    logprobs, entropy = response_values(model, batch, settings)
    rows = model(input_ids=batch.input_ids).logits[:, batch.prompt_length - 1 : -1].div(0.7).log_softmax(-1)
    expected = rows.gather(-1, batch.targets[..., None]).squeeze(-1)
    weights = torch.linspace(-1, 1, 8, dtype=torch.float64)[None] * batch.known
    assert (logit_form(model, batch.input_ids) is None) == (kind == "unknown")
    torch.testing.assert_close(logprobs, expected.where(batch.known, 0.0), rtol=1e-9, atol=1e-12)
    spread = -(rows.exp() * rows).sum(-1)
    torch.testing.assert_close(entropy, spread.where(batch.known, 0.0), rtol=1e-9, atol=1e-12)
    (logprobs * weights).sum().backward()
    found = taken(model)
    (expected * weights).sum().backward()
    # Cohere's norms are computed in float32
    assert_close(found, taken(model), 1e-5 if kind == "cohere" else 1e-9)


def test_the_weights_gradient_is_rounded_once():
    """bfloat16: as close to float64 as one rounding, whatever the number of blocks."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).bfloat16() for n in (600, 40))
    targets, made = torch.randint(0, 40, (600,), generator=generator), []
    for dtype in (torch.bfloat16, torch.float64):
        table = weight.to(dtype, copy=True).requires_grad_()
        token_logprobs(hidden.to(dtype), table, None, targets, Projection(chunk_tokens=7))[0].sum().backward()
        made.append(table.grad.double())
    error, size = (made[0] - made[1]).norm(), made[1].norm()
    assert error < 2**-8 * size


def test_one_position_is_projected_at_most_for_hidden_states(tiny_model):
    seen = []
    response_logprobs(tiny_model, batch_of(RESPONSES, STEPS), 1.0)  # compares the form of the logits
    tiny_model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:2]))
    response_logprobs(tiny_model, batch_of(RESPONSES, STEPS), 1.0)
    assert seen == [(3, 0)]


def test_a_model_without_logits_to_keep_gives_the_same(tiny_model, monkeypatch):
    batch = batch_of(RESPONSES, STEPS)
    with torch.no_grad():
        expected = response_logprobs(tiny_model, batch, 0.7)
        whole = tiny_model.forward

        def forward(input_ids, attention_mask, use_cache):
            return whole(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

        monkeypatch.setattr(tiny_model, "forward", forward)
        torch.testing.assert_close(response_logprobs(tiny_model, batch, 0.7), expected)


def test_batch(tiny_model):
    old = [torch.arange(len(response)) * -1.0 for response in RESPONSES]
    batch = batch_of(RESPONSES, STEPS, old)
    assert batch.prompt_length == 4
    assert batch.input_ids.tolist()[1] == [*PROMPT, 50, 51, 52, 0, 0, 0, 0]
    assert batch.attention_mask.tolist()[1] == [1] * 7 + [0] * 4
    assert batch.step_ids.tolist()[1] == [0, 0, 1, -1, -1, -1, -1]
    assert batch.old_logprobs.tolist()[1] == [0, -1, -2, 0, 0, 0, 0]
    assert batch.known.sum(1).tolist() == [7, 3, 5]


def slow_loss(model, steps, level, temperature, old, clip=0.2):
    """The loss of the docstring, written with loops and python's min over fresh forward passes."""
    total = 0.0
    for step in steps:
        per_response = []
        for row, response in enumerate(RESPONSES):
            advantage = ADVANTAGES[row][step]
            places = [place for place, owner in enumerate(STEPS[row]) if owner == step]
            if advantage is None or not places:
                continue
            logs = logprobs_alone(model, response, temperature)
            changes = [logs[t] - float(old[row][t]) for t in range(len(response))]
            if level == "token":
                ratios = [changes[t].exp() for t in places]
            elif level == "step":
                ratios = [(sum(changes[t] for t in places) / len(places)).exp()]
            else:
                whole = float(torch.exp(sum(changes) / len(changes)).detach())
                ratios = [whole * (logs[t] - logs[t].detach()).exp() for t in places]
            terms = []
            for ratio in ratios:
                cut = min(max(float(ratio.detach()), 1 - clip), 1 + clip)
                terms.append(
                    ratio * advantage
                    if float(ratio.detach()) * advantage <= cut * advantage
                    else ratio * 0.0 + cut * advantage
                )
            per_response.append(sum(terms) / len(terms))
        total = total - sum(per_response) / len(per_response)
    return total


@pytest.mark.parametrize("level", ["token", "step", "sequence"])
@pytest.mark.parametrize("clip", [0.2, 0.03])  # 0.03: the third response's ratio of 1.05 is clipped
def test_each_unit_has_the_gradient_of_its_own_loss(tiny_model, moved_batch, level, clip):
    old = [moved_batch.old_logprobs[row, : len(r)] for row, r in enumerate(RESPONSES)]
    units = units_of(groups=((0, 1), (2,)))
    seen = []
    for made in unit_gradients(tiny_model, moved_batch, units, clip_epsilon=clip, level=level):
        found = gradients(tiny_model)
        clear(tiny_model)
        loss = slow_loss(tiny_model, made.unit.steps, level, 1.0, old, clip)
        loss.backward()
        assert made.loss == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
        close(found, gradients(tiny_model))
        clear(tiny_model)
        seen.append(made.unit.steps)
    assert seen == [(0, 1), (2,)]


def test_temperature_scales_the_gradient_and_the_loss_scale_only_the_gradient(tiny_model):
    with torch.no_grad():
        old = [logprobs_alone(tiny_model, r, 0.7) for r in RESPONSES]
    batch = batch_of(RESPONSES, STEPS, old)
    units = units_of(groups=((1,),))
    (made,) = [*unit_gradients(tiny_model, batch, units, temperature=0.7, loss_scale=0.25)]
    found = gradients(tiny_model)
    clear(tiny_model)
    loss = slow_loss(tiny_model, (1,), "sequence", 0.7, old)
    loss.backward()
    assert made.loss == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    close(found, {name: 0.25 * gradient for name, gradient in gradients(tiny_model).items()})
    assert made.num_terms == 3 + 1 + 2 and made.num_clipped == 0


def test_the_units_gradients_add_up_to_that_of_all_steps(tiny_model, moved_batch):
    total = None
    for _ in unit_gradients(tiny_model, moved_batch, units_of()):
        mine = gradients(tiny_model)
        clear(tiny_model)
        total = mine if total is None else {name: total[name] + mine[name] for name in total}
    [*unit_gradients(tiny_model, moved_batch, units_of(groups=((0, 1, 2),)))]
    close(total, gradients(tiny_model))


def test_at_the_sampling_policy_the_gradient_is_that_of_reinforce(tiny_model):
    """All ratios are 1: minus the advantage times the mean gradient of the tokens' log-probabilities."""
    with torch.no_grad():
        old = [logprobs_alone(tiny_model, r) for r in RESPONSES]
    batch = batch_of(RESPONSES, STEPS, old)
    for level in ("token", "step", "sequence"):
        [*unit_gradients(tiny_model, batch, units_of(groups=((2,),)), level=level)]
        found = gradients(tiny_model)
        clear(tiny_model)
        first = logprobs_alone(tiny_model, RESPONSES[0])[5:].mean() * 0.4
        third = logprobs_alone(tiny_model, RESPONSES[2])[3:].mean() * -1.1
        (-(first + third) / 2).backward()
        close(found, gradients(tiny_model))
        clear(tiny_model)


def test_padding_and_tokens_of_other_responses_change_nothing(tiny_model, moved_batch):
    [*unit_gradients(tiny_model, moved_batch, units_of(groups=((1,),)))]
    expected = gradients(tiny_model)
    clear(tiny_model)
    moved_batch.input_ids[1, 7:] = 123
    moved_batch.old_logprobs[1, 3:] = float("nan")
    [*unit_gradients(tiny_model, moved_batch, units_of(groups=((1,),)))]
    close(gradients(tiny_model), expected)


def test_units_without_advantages_are_passed_over(tiny_model, moved_batch):
    nothing = [[None, 0.5, None]] * 3
    logprobs = []
    made = [*unit_gradients(tiny_model, moved_batch, units_of(nothing), on_logprobs=logprobs.append)]
    assert [unit.unit.steps for unit in made] == [(1,)]
    assert logprobs[0].shape == (3, 7) and not logprobs[0].requires_grad
    assert [*unit_gradients(tiny_model, moved_batch, units_of([[None] * 3] * 3))] == []


def test_a_loss_that_is_not_finite_is_refused(tiny_model, moved_batch):
    moved_batch.old_logprobs[0, 3] = -float("inf")
    found = unit_gradients(tiny_model, moved_batch, units_of(groups=((1,),)), level="token")
    with pytest.raises(NonFiniteLoss, match=r"steps \[1\]"):
        list(found)
    assert not gradients(tiny_model)


def test_trainable(tiny_model):
    names = [name for name, _ in trainable(tiny_model)]
    assert len(names) == len(set(names))
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names  # tied
    for parameter in tiny_model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match="no trainable"):
        trainable(tiny_model)
