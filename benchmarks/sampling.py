"""Useful tokens per CPU second of sampling in which rows leave and join, against static batches.

Responses are forced to ragged lengths: each has its own limit, exponentially distributed,
and nothing else ends it. Static batches take the requests in order and run each to its longest limit; every response has the
same seed in each arm. The vocabulary-wide draw is the same code everywhere, so the ratio is that of the batches.

    python benchmarks/sampling.py                                    # the bundled reasoner
    python benchmarks/sampling.py --model /models/SmolLM2-135M-Instruct --requests 32 --batch 16 --mean 32 --limit 128 --repeats 1
"""

from __future__ import annotations

import argparse
import time

import torch
from common import machine, table

from ssrctl.configs import SamplingConfig, TrainConfig
from ssrctl.models.loading import load_model
from ssrctl.sampling.engines.base import Request, Sample, sample_all
from ssrctl.sampling.engines.transformers_engine import TransformersEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--mean", type=int, default=25, help="mean of the exponential lengths")
    parser.add_argument("--limit", type=int, default=100, help="longest response")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    loaded = load_model(TrainConfig(model=args.model, device="cpu"))
    loaded.model.generation_config.eos_token_id = None
    loaded.tokenizer.eos_token = None
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(args.requests).exponential_(1 / args.mean, generator=generator).ceil().clamp(1, args.limit)
    prompt = loaded.tokenizer("48*6-2=?\n")["input_ids"]
    requests = [Request(prompt, int(n), seed) for seed, n in enumerate(lengths)]
    useful = int(lengths.sum())
    config = SamplingConfig(sampling_batch_size=args.batch)
    arms = {
        "static batches": TransformersEngine(loaded, config, refill=False, leave=False),
        "rows leave": TransformersEngine(loaded, config, refill=False),
        "rows leave and join": TransformersEngine(loaded, config),
    }
    sample_all(arms["static batches"], requests[: args.batch // 4])
    rates, found = dict.fromkeys(arms, 0.0), {}
    for _ in range(args.repeats):
        for name, engine in arms.items():
            began = time.process_time()
            found[name] = sample_all(engine, requests)
            rates[name] = max(rates[name], useful / (time.process_time() - began))
    base = found["static batches"]
    computed = sum(int(part.max()) * len(part) for part in lengths.split(args.batch))
    print(machine())
    print(
        f"{args.model}: {args.requests} requests, {useful} useful tokens, static batches compute {computed / useful:.2f} times that"
    )
    rows = [
        [name, f"{rate:.0f}", f"{rate / rates['static batches']:.2f}", _differing(base, found[name])]
        for name, rate in rates.items()
    ]
    print(table(["engine", "useful tokens / CPU s", "ratio", "responses that differ"], rows))


def _differing(base: list[Sample], other: list[Sample]) -> str:
    return f"{sum(a.response_ids != b.response_ids for a, b in zip(base, other, strict=True))} of {len(base)}"


if __name__ == "__main__":
    main()
