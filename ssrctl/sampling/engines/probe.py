"""A probe of an engine: fixed prompts whose sampled tokens have the trainer's log-probabilities, or the weights differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssrctl.core.seeds import derive_seed
from ssrctl.models.loading import LoadedModel
from ssrctl.sampling.engines.base import Probe, Request, Sample

# Well above the means that were measured: float32 1.6e-5, bfloat16 0.03 to 0.04 (between sampling and training).
BOUNDS = {torch.float16: 0.02, torch.bfloat16: 0.1}
FLOAT32_BOUND = 1e-3
_NUM_PROMPTS, _NUM_TOKENS = 2, 16


def gap_bound(dtype: torch.dtype) -> float:
    """Return the mean of \\|difference\\| between the log-probabilities of engine and trainer that rounding stays below."""
    return BOUNDS.get(dtype, FLOAT32_BOUND)


def probe_requests(loaded: LoadedModel, block_size: int) -> list[Request]:
    """Return the fixed requests: random tokens, more than a block of the engine's cache where the context has room.

    Only whole blocks are reused from request to request, so that a shorter prompt would not see a stale cache.
    """
    special = set(loaded.tokenizer.all_special_ids)
    plain = [token for token in range(len(loaded.tokenizer)) if token not in special]
    length = 2 * block_size + 1
    if loaded.context_length is not None:
        length = max(1, min(length, loaded.context_length - _NUM_TOKENS))
    requests = []
    for number in range(_NUM_PROMPTS):
        seed = derive_seed(0, "probe", number)
        places = torch.randint(len(plain), (length,), generator=torch.Generator().manual_seed(seed))
        requests.append(Request([plain[place] for place in places.tolist()], _NUM_TOKENS, seed))
    return requests


@torch.no_grad()
def trainer_logprobs(loaded: LoadedModel, request: Request, sample: Sample, temperature: float) -> Tensor:
    """Return the trainer's log-probabilities of a sample's tokens, float32 ``[R]`` on the CPU."""
    ids = torch.tensor([[*request.ids, *sample.response_ids]], device=loaded.device)
    count = len(sample.response_ids)
    logits = loaded.model(ids).logits[0, -count - 1 : -1].float() / temperature
    found: Tensor = logits.log_softmax(-1).gather(-1, ids[0, -count:, None]).squeeze(-1)
    return found.cpu()


def compare(loaded: LoadedModel, requests: Sequence[Request], samples: Sequence[Sample], temperature: float) -> Probe:
    """Compare the samples' log-probabilities with the trainer's."""
    gaps = torch.cat(
        [
            (sample.logprobs - trainer_logprobs(loaded, request, sample, temperature)).abs()
            for request, sample in zip(requests, samples, strict=True)
        ]
    ).nan_to_num(nan=float("inf"))
    answers = [(list(sample.response_ids), sample.logprobs) for sample in samples]
    return Probe(float(gaps.mean()), float(gaps.max()), answers)
