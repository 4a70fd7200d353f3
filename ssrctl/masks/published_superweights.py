"""The super weights of public models that were published, next to what is found."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass

from ssrctl.io.package_data import profile_path


@dataclass(frozen=True)
class PublishedSuperweights:
    """The published super weights of one model.

    Attributes:
        source: the paper and its table.
        model: the model's name on the hub.
        weights: (layer, output channel, input channel) in the MLP down projections.
    """

    source: str
    model: str
    weights: tuple[tuple[int, int, int], ...]

    def found(self, places: Collection[tuple[str, int, int]]) -> list[bool]:
        """Return for each weight whether it is among places, given as (parameter, output channel, input channel)."""
        return [
            any((out, into) == place[1:] and f".{layer}." in place[0] for place in places)
            for layer, out, into in self.weights
        ]


def published_superweights() -> list[PublishedSuperweights]:
    """Return all published super weights (Yu et al. 2024, table 2), a row for each model."""
    held = json.loads(profile_path("published", "yu-2024", ".json").read_text(encoding="utf-8"))
    source = f"{held['paper']}, {held['source']}"
    return [
        PublishedSuperweights(source, model, tuple((layer, out, into) for layer, out, into in weights))
        for model, weights in held["superweights"].items()
    ]


def superweights_of(name: str) -> PublishedSuperweights | None:
    """Return those of a model by its name on the hub, or by the last part of its path; None if there are none."""
    last = name.rstrip("/").rpartition("/")[2].casefold()
    return next((one for one in published_superweights() if one.model.rpartition("/")[2].casefold() == last), None)
