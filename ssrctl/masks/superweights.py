"""Language-critical weights of a model: gradients on prompts, and the effect of zeroing (SSR section 2.2)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssrctl.core.kl import kl_both_ways
from ssrctl.core.topk import NonFiniteGradient, select_topk
from ssrctl.core.unions import Candidates, Indices, find_candidates
from ssrctl.errors import UserError
from ssrctl.models.precision import ordered_sums

Tick = Callable[[], None]


def no_tick() -> None:
    """Do nothing, for callers that show no progress."""


# --------------------------------------------------------------------------------------------------
# subsets of prompts


def split_subsets(num_prompts: int, num_subsets: int, seed: int) -> list[list[int]]:
    """Shuffle ``num_prompts`` and deal them out: at most ``num_subsets`` lists whose sizes differ by at most 1.

    With fewer prompts than subsets, each prompt is a subset of its own.
    """
    order = torch.randperm(num_prompts, generator=torch.Generator().manual_seed(seed)).tolist()
    return [sorted(order[start::num_subsets]) for start in range(min(num_subsets, num_prompts))]


# --------------------------------------------------------------------------------------------------
# gradients


def prompt_gradient(model: Any, prompts: Sequence[Tensor], tick: Tick = no_tick) -> dict[str, Tensor]:
    """Compute the gradient of the next-token loss: the mean over prompts of each prompt's mean over its predicted tokens.

    It accumulates in place in ``parameter.grad`` over the prompts, and earlier gradients are dropped; set the
    gradients to None when done with them.

    Args:
        model: a causal LM.
        prompts: int64 ``[T]`` each, T at least 2.
        tick: called after each prompt.

    Returns:
        The gradients by parameter name, in the parameters' dtype; a parameter that the loss does not depend
        on is left out.

    Raises:
        UserError: the loss is NaN or infinite.
    """
    model.zero_grad(set_to_none=True)
    for ids in prompts:
        ids = ids.to(model.device)
        logits = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:]) / len(prompts)
        if not bool(loss.isfinite()):
            raise UserError(f"the next-token loss of a prompt is {float(loss.detach())}", "use --dtype float32")
        with ordered_sums():
            loss.backward()
        tick()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@dataclass(frozen=True)
class SubsetCandidates:
    """The result of ``collect_candidates``.

    Attributes:
        candidates: of the prompts' gradient.
        ranks: per watched weight, the share of all weights with a larger |gradient|, in [0, 1); 0 is the top.
    """

    candidates: Candidates
    ranks: list[float]


def collect_candidates(
    model: Any,
    prompts: Sequence[Tensor],
    *,
    num_members: int,
    keep: int,
    watched: Sequence[tuple[str, int]] = (),
    tick: Tick = no_tick,
) -> SubsetCandidates:
    """Find the largest |gradient| coordinates of a subset of the prompts.

    Args:
        model: a causal LM.
        prompts: int64 ``[T]`` each.
        num_members: candidates.
        keep: number of them that get a score (``core.unions``); 0 for ranks only.
        watched: (parameter name, flat index) of weights whose rank is wanted.
        tick: called after each prompt.

    Raises:
        UserError: a loss or gradient that is NaN or infinite, or a gradient that is 0 everywhere.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    try:
        gradients = prompt_gradient(model, prompts, tick)
        found = find_candidates(gradients, shapes, num_members, keep)
        if found.members.count() == 0:
            raise UserError("the gradient of the prompts is 0 everywhere", "give other prompts with --prompts FILE")
        return SubsetCandidates(found, [_rank(gradients, shapes, name, index) for name, index in watched])
    except NonFiniteGradient as error:
        raise UserError(str(error), "use --dtype float32") from error
    finally:
        model.zero_grad(set_to_none=True)


def _rank(gradients: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], name: str, index: int) -> float:
    value = gradients[name].reshape(-1)[index].abs() if name in gradients else torch.zeros(())
    larger = sum(int((g.abs() > value.to(g)).sum()) for g in gradients.values())
    return larger / sum(math.prod(shape) for shape in shapes.values())


def largest_weights(model: Any, size: int) -> Indices:
    """Return the ``size`` coordinates with the largest |weight|: ascending flat indices, int64, per parameter."""
    return {n: i.cpu() for n, i in select_topk({n: p.detach() for n, p in model.named_parameters()}, size).items()}


# --------------------------------------------------------------------------------------------------
# ablation


@contextlib.contextmanager
def ablated(model: Any, indices: Mapping[str, Tensor]) -> Iterator[None]:
    """Set the weights at ``indices`` to 0 within the block, and restore them bit for bit afterwards.

    The originals are kept and written back however the block ends (also by an exception or Ctrl-C).

    Args:
        model: whose parameters are changed in place.
        indices: flat indices, int64 ``[k_t]`` by parameter name.
    """
    parameters = dict(model.named_parameters())
    originals: list[tuple[Tensor, Tensor, Tensor]] = []

    def restore() -> None:
        for flat, place, values in originals:
            flat[place] = values

    try:
        for name, place in indices.items():
            if place.numel() == 0:
                continue
            flat = parameters[name].data.view(-1)
            place = place.to(flat.device)
            originals.append((flat, place, flat[place]))
            flat[place] = 0
        yield
    finally:
        try:
            restore()
        except BaseException:
            restore()  # a second Ctrl-C came while writing back; doing it again does no harm
            raise


@dataclass(frozen=True)
class Divergence:
    """The divergence of an ablated model from the model itself, in nats, averaged over token positions.

    Attributes:
        masked_reference: KL(masked || reference), eq. 1; inf when ``num_undefined`` is above 0.
        reference_masked: KL(reference || masked), likewise.
        num_positions: token positions averaged over.
        num_undefined: positions at which the ablated model's logits are NaN or infinite: it gives no
            distribution there, which counts as an infinite divergence.
    """

    masked_reference: float
    reference_masked: float
    num_positions: int
    num_undefined: int

    def to_dict(self) -> dict[str, Any]:
        """Return the values for a report: json has no infinity, so a value that is not finite is None."""
        return {
            "kl_masked_reference": _finite(self.masked_reference),
            "kl_reference_masked": _finite(self.reference_masked),
            "num_undefined": self.num_undefined,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class AblationProbe:
    """Measures KL between a model with some weights at 0 and the model as it is, on fixed texts.

    Args:
        model: a causal LM; its logits on ``prompts`` are computed now and kept (tokens x vocabulary values in
            the model's precision).
        prompts: int64 ``[T]`` each; every position counts, the last one too.
        tick: called after each measurement.

    Raises:
        UserError: the model's own logits are NaN or infinite.
    """

    def __init__(self, model: Any, prompts: Sequence[Tensor], tick: Tick = no_tick) -> None:
        self._model, self._tick = model, tick
        self._prompts = [ids.to(model.device) for ids in prompts]
        self._reference = [self._logits(ids) for ids in self._prompts]
        for logits in self._reference:
            if bool(kl_both_ways(logits, logits)[0].isnan().any()):
                raise UserError("the model's logits on the held-out prompts are NaN or infinite", "use --dtype float32")
        tick()

    def measure(self, indices: Mapping[str, Tensor]) -> Divergence:
        """Return the divergence with the weights at ``indices`` (flat, int64, by parameter name) set to 0."""
        sums = torch.zeros(2, dtype=torch.float64)
        num_positions = num_undefined = 0
        with ablated(self._model, indices):
            for ids, reference in zip(self._prompts, self._reference, strict=True):
                forward, backward = kl_both_ways(self._logits(ids), reference)
                undefined = forward.isnan()
                num_undefined += int(undefined.sum())
                num_positions += ids.numel()
                sums += torch.stack([forward[~undefined].sum(), backward[~undefined].sum()]).double().cpu()
        self._tick()
        if num_undefined:
            return Divergence(math.inf, math.inf, num_positions, num_undefined)
        # KL is at least 0; rounding can leave -1e-17 where nothing changed.
        means = (sums / num_positions).clamp(min=0.0)
        return Divergence(float(means[0]), float(means[1]), num_positions, 0)

    @torch.no_grad()
    def _logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]
        return logits
