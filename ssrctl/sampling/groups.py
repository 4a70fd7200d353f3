"""Groups of responses to one question: sampling, segmentation into steps, alignment of steps with tokens."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ssrctl.configs import SamplingConfig, SegmentOptions
from ssrctl.core.seeds import derive_seed
from ssrctl.errors import UserError
from ssrctl.io import console
from ssrctl.io.problems import Problem
from ssrctl.io.records import FinalAnswer, Rollout, StepSpan
from ssrctl.models.loading import LoadedModel
from ssrctl.sampling.alignment import step_of_tokens, token_starts
from ssrctl.sampling.endings import response_limit
from ssrctl.sampling.engines.base import Engine, Request, Sample, sample_all
from ssrctl.sampling.engines.transformers_engine import TransformersEngine
from ssrctl.text.prompts import PromptFormat, build_prompt, encode_prompt, shown_prompt, use_chat_template
from ssrctl.text.segment import segment


@dataclass(frozen=True)
class Prompted:
    """A problem with its prompt as text and as tokens."""

    problem: Problem
    prompt: str
    prompt_ids: list[int]


@dataclass
class Group:
    """All responses to one question.

    Attributes:
        prompted: the question.
        samples: tokens and log-probabilities.
        rollouts: the records, in the same order, with ``steps`` filled and, after scoring, ``scores``.
        token_steps: per response, the step of each token (-1 throughout where the response has no step).
        response_rewards: per response, the reward of ``--reward``; None without one.
    """

    prompted: Prompted
    samples: list[Sample]
    rollouts: list[Rollout]
    token_steps: list[list[int]]
    response_rewards: list[float | None] | None = None

    @property
    def id(self) -> str:
        return self.prompted.problem.id

    def rewards(self) -> list[list[float | None]]:
        """Per response, the reward of each step; None where missing."""
        return [[score.reward for score in rollout.scores or ()] for rollout in self.rollouts]


def join_groups(parts: Sequence[tuple[Sequence[int], Group]]) -> Group:
    """Join the parts of a group, each given with the numbers of its responses, in the order of these."""
    order = sorted(
        (number, place, part) for part, (numbers, _) in enumerate(parts) for place, number in enumerate(numbers)
    )
    rows = [(parts[part][1], place) for _, place, part in order]
    return Group(
        parts[0][1].prompted,
        [group.samples[place] for group, place in rows],
        [group.rollouts[place] for group, place in rows],
        [group.token_steps[place] for group, place in rows],
    )


def prepare_prompts(
    loaded: LoadedModel, problems: Iterable[Problem], prompt_format: PromptFormat, max_new_tokens: int
) -> tuple[list[Prompted], str]:
    """Build and encode the prompt of every question; leave out those that do not fit the model's context, with a warning.

    A prompt fits when it leaves room for ``max_new_tokens`` or for half the context, whichever is less;
    responses then end where the context does.

    Returns:
        The prompts that fit; and the first as the model gets it, special tokens included, escaped and shortened for one
        line, which is also printed.

    Raises:
        UserError: none fits, one cannot be built or encoded (``build_prompt``, ``encode_prompt``), or one has a token that
            the model does not know.
    """
    use_chat_template(loaded.tokenizer, prompt_format)
    context = loaded.context_length
    rows = getattr(getattr(loaded.model.get_input_embeddings(), "weight", None), "shape", [None])[0]
    kept: list[Prompted] = []
    longest = total = 0
    for problem in problems:
        total += 1
        prompt = build_prompt(loaded.tokenizer, prompt_format, problem.question, problem.messages)
        ids = encode_prompt(loaded.tokenizer, prompt)
        if rows is not None and ids and max(ids) >= rows:
            raise UserError(
                f"question {problem.id} has token {max(ids)} ({loaded.tokenizer.decode([max(ids)])!r}), the model's "
                f"embedding has rows 0 to {rows - 1}",
                "use the tokenizer that belongs to the model, or resize the model's embedding to it",
            )
        longest = max(longest, len(ids))
        if ids and (context is None or len(ids) + min(max_new_tokens, context // 2) <= context):
            kept.append(Prompted(problem, prompt, ids))
    if not kept:
        raise UserError(
            f"none of {total} prompts fits: they have up to {longest} tokens and the model's context is {context}; "
            f"half of it (or --max-new-tokens {max_new_tokens}) is kept for the response",
            "use shorter questions or a model with a longer context",
        )
    if len(kept) < total:
        console.warn(f"{total - len(kept)} of {total} questions do not fit the context and are left out")
    first_prompt = shown_prompt(loaded.tokenizer.decode(kept[0].prompt_ids, clean_up_tokenization_spaces=False))
    console.note(f"first prompt: {first_prompt}")
    return kept, first_prompt


def sample_groups(
    loaded: LoadedModel,
    prompts: Sequence[Prompted],
    sampling: SamplingConfig,
    *,
    num_generations: int,
    seed: int,
    segmentation: SegmentOptions | None = None,
    engine: Engine | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Group]:
    """Sample ``num_generations`` responses per prompt and segment them.

    Args:
        loaded: the model.
        prompts: the questions.
        sampling: settings; ``sampling_batch_size`` responses go through the model at once.
        num_generations: G, responses per question.
        seed: seed of the sampling; each response derives its own from it, the question's id and its number.
        segmentation: settings of the segmentation into steps; None is the default.
        engine: samples the responses; None is transformers in this process.
        numbers: ascending numbers of the responses to sample, in place of all G.

    Raises:
        UserError: the engine returned fewer responses than asked for.
    """
    numbers = range(num_generations) if numbers is None else numbers
    seen: Counter[str] = Counter()  # a question that is there twice gets other responses the second time
    requests = []
    for prompt in prompts:
        again, seen[prompt.problem.id] = seen[prompt.problem.id], seen[prompt.problem.id] + 1
        requests += [
            response_request(loaded, prompt, sampling, derive_seed(seed, "response", prompt.problem.id, number, again))
            for number in numbers
        ]
    samples = sample_all(engine or TransformersEngine(loaded, sampling), requests)
    cuts = (segmentation or SegmentOptions()).segment_arguments
    groups = []
    for place, prompt in enumerate(prompts):
        mine = samples[place * len(numbers) : (place + 1) * len(numbers)]
        rollouts = [
            record_of(prompt, number, sample, steps=segment(sample.text, **cuts))
            for number, sample in zip(numbers, mine, strict=True)
        ]
        groups.append(
            Group(prompt, mine, rollouts, [_token_steps(loaded, r, s) for r, s in zip(rollouts, mine, strict=True)])
        )
    return groups


def response_request(loaded: LoadedModel, prompt: Prompted, sampling: SamplingConfig, seed: int) -> Request:
    """Return the request for a response to a prompt, which ends where the model's context does."""
    limit = response_limit(prompt.prompt_ids, sampling.max_new_tokens, loaded.context_length)
    return Request(prompt.prompt_ids, limit, seed)


def record_of(
    prompt: Prompted,
    number: int,
    sample: Sample,
    *,
    steps: list[StepSpan] | None = None,
    final: FinalAnswer | None = None,
) -> Rollout:
    """Return the record of one response to a prompt; ``number`` counts the responses to it, from 0."""
    problem = prompt.problem
    extra = copy.deepcopy(problem.extra) | {"num_tokens": len(sample.response_ids), "finished": sample.finished}
    extra |= {"ended_by_stop": True} if sample.stopped else {}
    return Rollout(
        id=f"{problem.id}/{number}",
        question=problem.question,
        answer=problem.answer,
        prompt=prompt.prompt,
        response=sample.text,
        steps=steps,
        final=final,
        extra=extra,
    )


def _token_steps(loaded: LoadedModel, rollout: Rollout, sample: Sample) -> list[int]:
    assert rollout.steps is not None
    return step_of_tokens(token_starts(loaded.tokenizer, sample.response_ids, sample.text), rollout.steps)
