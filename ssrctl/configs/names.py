"""Names of settings: the flag that a field is shown as, and aliases."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

# Name that other tools use -> field: accepted without a word.
ALIASES: Mapping[str, Mapping[str, str]] = {
    "ModelConfig": {"model_name_or_path": "model"},
    "MaskSource": {"model_name_or_path": "model"},
    "DatasetConfig": {"dataset_name": "dataset"},
    "RolloutOptions": {
        "vllm_server_base_url": "rollout_server_url",
        "vllm_server_timeout": "rollout_server_timeout",
    },
    "OptimizerOptions": {"optim": "optimizer", "lr": "learning_rate"},
}

# `ssrctl critic` shows the critic's settings without their prefix where nothing else has that name.
SHORT_NAMES: Mapping[str, Mapping[str, str]] = {
    "CriticConfig": {
        name: f"critic_{name}"
        for name in (
            "rubric",
            "per_step",
            "show_reference",
            "max_concurrency",
            "requests_per_minute",
            "input_price",
            "output_price",
            "budget_usd",
            "cache",
            "cache_dir",
            "rollout_value",
            "prm_style",
            "prm_step_tag",
            "prm_tokenizer",
            "prm_zero",
        )
    }
}


Result = TypeVar("Result")


def once_per_class(function: Callable[[type], Result]) -> Callable[[type], Result]:
    """Cache the results of a function of a class.

    mypy takes a dataclass that can change for an argument that ``functools.cache`` cannot hash, though its class can be.
    """
    return functools.cache(function)


@once_per_class
def accepted_names(kind: type) -> dict[str, str]:
    """Return {name: field} of every name that is accepted besides the fields' own."""
    return _merged(ALIASES, kind) | _merged(SHORT_NAMES, kind)


def flag(kind: type, name: str) -> str:
    """Return the flag of a field as users type it, or the name of a positional argument."""
    for spec in dataclasses.fields(kind):
        if spec.name == name and "metavar" in spec.metadata:
            return str(spec.metadata["metavar"])
    shown = {field: short for short, field in _merged(SHORT_NAMES, kind).items()}
    return "--" + shown.get(name, name).replace("_", "-")


def _merged(table: Mapping[str, Mapping[str, str]], kind: type) -> dict[str, str]:
    return {name: field for base in kind.__mro__ for name, field in table.get(base.__name__, {}).items()}
