"""The memory of a training run from a model's config alone, and the settings that fit a limit.

Activations and caches come from layers without data (``layer_bytes``); logits, gradients and the state of the update
follow from counts. Allocators round sizes up and hold freed blocks: the margin of the limit is for that.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ssrctl.configs import TrainConfig
from ssrctl.errors import UserError
from ssrctl.io import console
from ssrctl.models.loading import LoadedModel, free_bytes
from ssrctl.models.precision import resolve_device
from ssrctl.training.layer_bytes import LayerProbe, UnknownActivations
from ssrctl.training.step_gradients.chunked import default_chunk_tokens
from ssrctl.training.step_gradients.chunks import cache_obstacle
from ssrctl.training.updaters import updater_kind

# Copies in float32 of a block of logits: forward with its entropy, backward, and of a sampled token's.
FORWARD_LOGITS, BACKWARD_LOGITS, SAMPLED_LOGITS = 3, 2, 3.9
# Share of a limit that plans leave to the allocator and the device's context.
MARGIN = 0.08
# Dials of recomputed step gradients that are tried, the cheaper first: more steps at once save forward passes, smaller chunks
# cost more of them, each with its own overhead. On a GPU the overhead is most of a small chunk's time, so that large chunks
# come before more steps at once.
STEPS_AT_ONCE = (8, 4, 2, 1)
CHUNK_TOKENS = (1024, 256)
CHUNK_TOKENS_ON_CUDA = (8192, 4096, 2048, *CHUNK_TOKENS)
GIB = 2**30
MOST_TOKENS = 1 << 20  # planned for where the config names no context


@dataclass(frozen=True)
class Breakdown:
    """The planned peak of a run in bytes, by what takes it; the larger of update and sampling counts.

    Attributes:
        weights: of the model.
        state: of the update, between and during backward passes, without the gradient in progress.
        gradients: that exist at the peak of a backward pass.
        activations: kept for the backward pass.
        logits: and their log-probabilities.
        sampling: keys, values and logits of the responses sampled at once.
    """

    weights: int
    state: int
    gradients: int
    activations: int
    logits: int
    sampling: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.state + max(self.gradients + self.activations + self.logits, self.sampling)


class MemoryPlanner:
    """Plans of one model under different settings.

    Args:
        model: built from its config, on the meta device or any other.
        prompt_tokens: tokens of the longest prompt.
        trained_frac: share of the weights that a static mask trains; 1 without one.
        shards: processes that each hold a shard of the model and run a share of each question's responses.

    Methods raise ``UnknownActivations`` for a model whose layers cannot run on tensors without data.
    """

    def __init__(self, model: Any, prompt_tokens: int, trained_frac: float = 1.0, shards: int = 1) -> None:
        self.prompt_tokens, self.trained_frac, self.shards = prompt_tokens, trained_frac, shards
        self.may_recompute = cache_obstacle(model) is None
        inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.adapters = trained if trained < self.num_parameters else 0  # of LoRA, in float32
        self.num_parameters -= self.adapters
        self.table, self.tied = outputs.numel(), outputs is inputs
        self.vocabulary, self.width = outputs.shape
        self.layers = LayerProbe(model)

    def breakdown(self, config: TrainConfig) -> Breakdown:
        """Return the planned peak of a run with these settings, whose dtype is settled."""
        dtype = torch.float32 if config.dtype == "stored" else getattr(torch, config.dtype)
        tokens = self.prompt_tokens + config.max_new_tokens
        rows = mine = -(-config.num_generations // self.shards)
        if config.micro_batch_tokens is not None:
            rows = max(1, min(rows, config.micro_batch_tokens // tokens))
        recomputed = config.step_gradient == "recomputed"
        # recomputed chunks have one response's tokens, or several whole responses
        chunk = config.gradient_chunk_tokens or default_chunk_tokens(resolve_device(config.device).type)
        rows_at_once = max(1, min(rows, chunk // tokens)) if recomputed else rows
        held_at_once = min(tokens, chunk) if recomputed else tokens
        layers = self.layers.activations(
            rows_at_once, held_at_once, config.gradient_checkpointing, dtype, config.attn_implementation
        )
        cache = self.layers.cache(dtype)
        steps_at_once = (config.units_at_once or 1) if recomputed else 1
        cached = 0.0
        if config.step_gradient in ("recomputed", "chunked"):  # keys and values, and their gradients
            cached = (rows + steps_at_once * rows_at_once) * tokens * cache.token
        kept, first = layers.kept + cached, layers.first + cached
        several_units = config.optimizer == "kronos" and config.allocation != "pooled"
        if several_units and config.micro_batch_tokens is None and config.step_gradient in ("auto", "kept", "chunked"):
            first = kept  # the graph stays for the next unit
        whole, table = self.num_parameters * dtype.itemsize, self.table * dtype.itemsize
        trained, size = (self.adapters, 4) if self.adapters else (self.num_parameters, dtype.itemsize)
        gathered = 0
        if self.shards > 1:
            tables = (2 - self.tied) * table
            # beside the shards, the tables' whole weights, and two layers': FSDP gathers the next one early
            gathered = tables + 2 * (whole - tables) // len(self.layers.kinds)
        complete = gradient = whole // self.shards + gathered
        if self.adapters:
            gradient, table = trained * size, 0
        # gradients of the micro-batches that are done; of later chunks, and of other steps
        before = steps_at_once * gradient if recomputed else gradient if rows < mine else 0
        piecemeal = config.optimizer == "kronos" and config.scope == "tensor"
        projected = rows_at_once * min(config.max_new_tokens, held_at_once)
        logits = min(projected, config.logit_chunk_tokens) * self.vocabulary * 4
        states = 3 * projected * self.width * 4
        moments: list[tuple[float, float, float]] = [
            (before, kept, FORWARD_LOGITS * logits),
            (before + table, kept, BACKWARD_LOGITS * logits + states),
            # the last layer; a tied table's gradient waits for the embedding's
            (before + (0 if piecemeal and not self.tied else table), kept + layers.backward, 0),
            # the first layer
            (max(table * self.tied if piecemeal else gradient, before), first + layers.backward, 0),
            # the embedding: its gradient, that of a tied head, and their sum, before it is added to earlier ones
            (max(table if piecemeal else gradient, before) + table * (2 * self.tied + (before > 0)), first, 0),
        ]
        at_peak = [int(size) for size in max(moments, key=sum)]
        sampled = min(config.sampling_batch_size, config.questions_per_step * config.num_generations)
        sampled = -(-sampled // self.shards)
        held_while_sampling = sampled * (tokens * cache.token + cache.state)
        held = updater_kind(config).held_bytes(config, size, self.trained_frac)
        held += size if config.keeps_start_weights else 0
        return Breakdown(
            weights=complete + self.adapters * 4,
            state=int(trained * held) // self.shards,
            gradients=at_peak[0],
            activations=at_peak[1],
            logits=at_peak[2],
            # while a layer's cache grows, its old and new ones exist
            sampling=int(
                held_while_sampling * (1 + 2 / len(self.layers.kinds)) + sampled * self.vocabulary * 4 * SAMPLED_LOGITS
            )
            + (whole if self.shards > 1 and config.gathers_whole else 0),
        )

    def cheapest(self, config: TrainConfig, limit: int) -> TrainConfig | None:
        """Return the settings that fit ``limit`` bytes at the least extra time; None if none do.

        Tried are, in this order: the settings as they are, fewer responses sampled at once, recomputed step gradients,
        micro-batches, activation checkpointing, both. The update stays the same.
        """
        return next((made for made in self._dials(config) if self.fits(made, limit)), None)

    def smallest(self, config: TrainConfig) -> TrainConfig:
        """Return the settings of ``cheapest`` that take the least memory."""
        return min(self._dials(config), key=lambda made: self.breakdown(made).total)

    def fits(self, config: TrainConfig, limit: int, *, sampling: bool = True) -> bool:
        """Return True if the planned peak, of the update alone without ``sampling``, is within the limit, with its margin."""
        found = self.breakdown(config)
        peak = found.total if sampling else dataclasses.replace(found, sampling=0).total
        return peak <= limit * (1 - MARGIN)

    def longest(self, config: TrainConfig, limit: int, most: int) -> int:
        """Return the most new tokens per response that fit with some settings, in steps of 1/8 of a power of two.

        Args:
            config: the run's settings.
            limit: in bytes.
            most: tokens that the context has room for.

        Returns:
            0 if not even 64 tokens fit.
        """
        lengths = [base * part // 8 for base in (64 << power for power in range(20)) for part in range(8, 16)]
        lengths = [length for length in lengths if length < most] + [most]
        low, high = 0, len(lengths)  # lengths[:low] fit
        while low < high:
            middle = (low + high) // 2
            if self.fits(self.smallest(_at_length(config, lengths[middle])), limit):
                low = middle + 1
            else:
                high = middle
        return lengths[low - 1] if low else 0

    def _dials(self, config: TrainConfig) -> Iterator[TrainConfig]:
        tokens = self.prompt_tokens + config.max_new_tokens
        rows = [1 << power for power in reversed(range((config.num_generations - 1).bit_length()))]
        micro: list[int | None] = [None]
        if config.scope == "global" and config.step_gradient in ("auto", "truncated"):
            micro += [count * tokens for count in rows]
        yield config
        for made in (config, *self._recomputed(config)):
            if (plan := self._with_sampling(made)) != config:
                yield plan
        checkpointing = [False, True] if config.step_gradient in ("auto", "kept", "truncated") else [False]
        for checkpointed in [True] if config.gradient_checkpointing else checkpointing:
            for most in micro if config.micro_batch_tokens is None else [config.micro_batch_tokens]:
                made = dataclasses.replace(config, gradient_checkpointing=checkpointed, micro_batch_tokens=most)
                if made != config:  # that came first
                    yield self._with_sampling(made)

    def _recomputed(self, config: TrainConfig) -> Iterator[TrainConfig]:
        """Yield the settings with recomputed step gradients, the cheaper first; none if they cannot be."""
        if not (self.may_recompute and recomputes_if_needed(config)):
            return
        on_cuda = resolve_device(config.device).type == "cuda"
        steps = STEPS_AT_ONCE if config.units_at_once is None else (config.units_at_once,)
        usual = CHUNK_TOKENS_ON_CUDA if on_cuda else CHUNK_TOKENS
        chunks = usual if config.gradient_chunk_tokens is None else (config.gradient_chunk_tokens,)
        pairs = itertools.product(steps, chunks)
        for count, tokens in sorted(pairs, key=lambda pair: -pair[1]) if on_cuda else pairs:
            yield dataclasses.replace(
                config, step_gradient="recomputed", units_at_once=count, gradient_chunk_tokens=tokens
            )

    def _with_sampling(self, made: TrainConfig) -> TrainConfig:
        """Return the settings with the largest sampling batch that takes no more memory than the update does."""
        sampled = min(made.sampling_batch_size, made.questions_per_step * made.num_generations)
        for count in (sampled, *(1 << power for power in reversed(range((sampled - 1).bit_length())))):
            plan = dataclasses.replace(made, sampling_batch_size=count)
            found = self.breakdown(plan)
            if found.sampling <= found.gradients + found.activations + found.logits:
                break
        return made if count == sampled else plan


def recomputes_if_needed(config: TrainConfig) -> bool:
    """Return True for settings under which ``auto`` may take recomputed step gradients, if the model allows it."""
    return (
        config.optimizer == "kronos"
        and config.scope == "global"
        and config.step_gradient in ("auto", "recomputed")
        and config.micro_batch_tokens is None
        and not config.gradient_checkpointing
    )


def settle_step_gradient(
    config: TrainConfig, loaded: LoadedModel, prompt_tokens: int, trained_frac: float
) -> TrainConfig:
    """Return the settings with ``--step-gradient auto`` and the dials of recomputed gradients decided by memory.

    By lengths and sizes only: where the longest responses fit the limit with every activation kept, ``auto`` stays, which
    takes the cheapest exact way for each question. Otherwise recomputed gradients with the dials that fit. Other updates
    and ways stay as they are; a plan that does not fit is warned about.

    Args:
        config, loaded, prompt_tokens, trained_frac: as in ``memory_facts``.

    Raises:
        UserError: ``--memory-limit`` cannot be met.
    """
    limit = _limit(config)
    if limit is not None and config.memory_limit is None and resolve_device(config.device).type == "cuda":
        limit += sum(parameter.nbytes for parameter in loaded.model.parameters())  # loaded already, and planned for
    if limit is None or _surely_fits(config, loaded.model, prompt_tokens, limit):
        return config
    planner = MemoryPlanner(loaded.model, prompt_tokens, trained_frac)
    try:
        plans = [config, *planner._recomputed(config)]
        settled = next((made for made in plans if planner.fits(made, limit, sampling=False)), None)
    except UnknownActivations:
        return config
    if settled is None:
        if config.memory_limit is not None:
            require_fit(planner, config, limit)  # raises, unless other settings than these would fit
        settled = plans[-1]
        even = " even with recomputed step gradients" if len(plans) > 1 else ""
        console.warn(
            f"the longest responses are planned to take {planner.breakdown(settled).total / GIB:.3g} GiB{even}, "
            f"{limit / GIB:.3g} are there; ssrctl train --dry-run names settings that fit"
        )
    if settled.step_gradient == "recomputed":
        console.note(
            f"step gradients: recomputed, steps at once: {settled.units_at_once}, chunks of "
            f"{settled.gradient_chunk_tokens} tokens (planned peak {planner.breakdown(settled).total / GIB:.3g} of "
            f"{limit / GIB:.3g} GiB)"
        )
    return settled


def _surely_fits(config: TrainConfig, model: Any, prompt_tokens: int, limit: int) -> bool:
    """Return True if even many times the usual activations take a small part of the limit: planning takes a second.

    A layer of a transformer keeps about 10 (hidden + intermediate) numbers per token, and, where its attention is not fused,
    its scores a few times; both are counted four times over.
    """
    described = model.config.get_text_config()
    inner, heads = (getattr(described, name, None) for name in ("intermediate_size", "num_attention_heads"))
    if config.step_gradient == "recomputed" or not isinstance(inner, int) or not isinstance(heads, int):
        return False
    tokens = prompt_tokens + config.max_new_tokens
    each = 40 * (described.hidden_size + inner) + 8 * heads * tokens
    activations = 4 * config.num_generations * tokens * described.num_hidden_layers * each
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return bool(activations + 4 * weights < limit / 4)


def _limit(config: TrainConfig) -> int | None:
    return free_bytes(resolve_device(config.device)) if config.memory_limit is None else int(config.memory_limit * GIB)


def _at_length(config: TrainConfig, tokens: int) -> TrainConfig:
    return dataclasses.replace(config, max_new_tokens=tokens)


def describe_dials(config: TrainConfig, start: TrainConfig) -> str:
    """Return the flags in which settings differ from those of the run; ``as given`` if in none."""
    flags = []
    if config.step_gradient != start.step_gradient:
        flags.append(f"--step-gradient {config.step_gradient}")
    if config.gradient_checkpointing and not start.gradient_checkpointing:
        flags.append("--gradient-checkpointing")
    for name in ("units_at_once", "gradient_chunk_tokens", "micro_batch_tokens", "sampling_batch_size"):
        if getattr(config, name) != getattr(start, name):
            flags.append(f"--{name.replace('_', '-')} {getattr(config, name)}")
    return " ".join(flags) or "as given"


def require_fit(planner: MemoryPlanner, config: TrainConfig, limit: int) -> TrainConfig:
    """Return the cheapest settings that fit.

    Raises:
        UserError: none do, with what the run would take at the least, and the setting that would help.
    """
    made = planner.cheapest(config, limit)
    if made is not None:
        return made
    least = planner.smallest(config)
    found = planner.breakdown(least)
    parts = {
        "weights": (found.weights, "--dtype bfloat16, or a smaller model"),
        "state of the update": (found.state, _state_remedy(config)),
        "gradients": (found.gradients, "--scope tensor" if config.optimizer == "kronos" else "--optimizer kronos"),
        "activations": (found.activations, "--max-new-tokens or --num-generations"),
        "logits": (found.logits, "--max-new-tokens"),
    }
    name, (size, remedy) = max(parts.items(), key=lambda part: part[1][0])
    if name == "weights" and config.dtype != "float32":
        name, (size, remedy) = max(list(parts.items())[1:], key=lambda part: part[1][0])
    raise UserError(
        f"the run needs {found.total / (1 - MARGIN) / GIB:.3g} GiB at the least ({describe_dials(least, config)}), the limit "
        f"is {limit / GIB:.3g} GiB; weights take {found.weights / GIB:.3g} and the {name} {size / GIB:.3g}",
        f"change {remedy}, or raise --memory-limit",
    )


def _state_remedy(config: TrainConfig) -> str:
    if config.lora_r is not None:
        return "--lora-r or --lora-target-modules"
    if config.optimizer == "adamw":
        return "--optimizer kronos or --mask, whose state is for the trained weights only"
    return "--questions-per-step or --budget, or use --no-master-weights"


def memory_facts(
    config: TrainConfig, loaded: LoadedModel, prompt_tokens: int, trained_frac: float, shards: int = 1
) -> dict[str, Any]:
    """Return the part of a plan that is about memory, for ``--memory-limit`` or what is free on the device.

    Args:
        config: the run's settings, with the dtype settled.
        loaded: the model; only its config and shapes are used.
        prompt_tokens: tokens of the longest prompt.
        trained_frac: share of the weights that a mask trains; 1 without one.
        shards: processes that each hold a shard of the model; the plan is that of one of them.

    Raises:
        UserError: ``--memory-limit`` cannot be met.
    """
    planner = MemoryPlanner(loaded.model, prompt_tokens, trained_frac, shards)
    try:
        found = planner.breakdown(config)
    except UnknownActivations as error:
        console.warn(error.message)
        return {}
    limit = _limit(config)
    parts = {name: round(size / GIB, 3) for name, size in dataclasses.asdict(found).items()}
    facts: dict[str, Any] = {"planned_gib": round(found.total / GIB, 3), "planned_gib_by_part": parts}
    if limit is None:
        return facts
    facts["memory_limit_gib"] = round(limit / GIB, 3)
    facts["fits"] = f"{'yes' if planner.fits(config, limit) else 'no'}, with {MARGIN:.0%} of the limit kept free"
    if shards > 1:  # the other dials are not those of shards
        return facts
    made = planner.cheapest(config, limit) if config.memory_limit is None else require_fit(planner, config, limit)
    room = max(1, (loaded.context_length or MOST_TOKENS) - prompt_tokens)
    longest = {name: planner.longest(one, limit, room) for name, one in updates(config)}
    return facts | {
        "cheapest_settings_that_fit": "none" if made is None else describe_dials(made, config),
        "longest_response_that_fits": longest,
    }


def updates(config: TrainConfig) -> Sequence[tuple[str, TrainConfig]]:
    """Return the run's update by name; for kronos both scopes, where the settings allow them."""
    if config.optimizer != "kronos":
        return [("lora" if config.lora_r else "masked adamw" if config.mask else "adamw", config)]
    whole = config.allocation == "shuffled" or config.log_gradient_cosine or config.micro_batch_tokens is not None
    whole |= config.log_signs_every > 0
    scopes: list[Literal["global", "tensor"]] = ["global"] if whole else ["global", "tensor"]
    return [(f"kronos --scope {scope}", dataclasses.replace(config, scope=scope)) for scope in scopes]
