"""Budget profiles: how much gradient later steps still find, as json (SSR section 2.3.3)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ssrctl.core.budget import step_budgets, step_weights
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity
from ssrctl.io.files import existing_file, write_text

FORMAT = "ssrctl-budget-profile"
VERSION = 1
TABLE_STEPS = (1, 2, 4, 8, 16, 24)
REMEDY = "make it again with `ssrctl profile-budget`"


@dataclass(frozen=True, kw_only=True)
class BudgetProfile:
    """The curve v_1.. and how it was measured; every list has one value per step index.

    Example::

        BudgetProfile(model=ModelIdentity(name="org/model", revision=None, fingerprint="xxh3:..."),
                      curve=[1.0, 0.8], std=[0.0, 0.1], num_problems=[8, 6], energy_available=[1.0, 0.7],
                      energy_claimed=[0.88, 0.6], claim_fraction=0.01)

    Attributes:
        model: whose gradients these are.
        curve: mean over problems of the magnitude mass still available at each step, divided by that of the
            first; at least 0, and v_1 = 1. Past its end the last value holds.
        std: population standard deviation over these problems, in the same unit.
        num_problems: how many problems each mean is over, at least 1.
        energy_available: mean share of the step's squared gradient on coordinates that are neither protected
            nor claimed before it, in [0, 1].
        energy_claimed: mean share of it on the coordinates that the step itself claimed, in [0, 1].
        claim_fraction: share of the unprotected coordinates that each profiled step claimed.
        settings: what made it.
    """

    model: ModelIdentity
    curve: list[float]
    std: list[float]
    num_problems: list[int]
    energy_available: list[float]
    energy_claimed: list[float]
    claim_fraction: float
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> dict[str, dict[str, list[float]]]:
        """For reading: weights w_i and budgets k_i (with B = 5%, k_max = 1%) for some numbers of steps."""
        return {
            str(steps): {"w": step_weights(self.curve, steps), "k": step_budgets(self.curve, steps)}
            for steps in TABLE_STEPS
        }

    def to_dict(self) -> dict[str, Any]:
        """The json object of the file."""
        return {"format": FORMAT, "version": VERSION} | asdict(self) | {"table": self.table()}


def save_budget_profile(path: str | Path, profile: BudgetProfile) -> None:
    """Write ``profile``, whole or not at all; a value that is not finite is a ValueError."""
    write_text(path, json.dumps(profile.to_dict(), indent=1, allow_nan=False) + "\n")


def load_budget_profile(path: str | Path) -> BudgetProfile:
    """Read a profile and check every field.

    The ``table`` is for human readers and is not read: budgets are computed from the curve.

    Raises:
        UserError: a missing or torn file, another format or version, or a field that is absent or outside its
            range; the message names the file and the field.
    """
    file = existing_file(path, "budget profile")
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # bad utf-8 is a ValueError too
        raise UserError(f"{file}: not valid json: {error}", REMEDY) from error
    if not isinstance(row, dict) or row.get("format") != FORMAT:
        found = row.get("format") if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{file} is not a budget profile: 'format' is {found!r}, expected {FORMAT!r}", REMEDY)
    if row.get("version") != VERSION:
        raise UserError(f"{file}: 'version' is {row.get('version')!r}, this version of ssrctl reads {VERSION}", REMEDY)
    curve = _numbers(row, "curve", file, _at_least_0)
    if not curve or not math.isclose(curve[0], 1.0, abs_tol=1e-9):
        raise UserError(f"{file}: 'curve' must begin with v_1 = 1, found {curve[:1]}", REMEDY)
    claim_fraction: Any = row.get("claim_fraction")
    if not _number(claim_fraction) or not 0 < claim_fraction < 1:
        raise UserError(f"{file}: 'claim_fraction' must be between 0 and 1, found {claim_fraction!r}", REMEDY)
    settings = row.get("settings")
    if not isinstance(settings, dict):
        raise UserError(f"{file}: 'settings' must be an object, found {type(settings).__name__}", REMEDY)
    return BudgetProfile(
        model=_model(row, file),
        curve=curve,
        std=_numbers(row, "std", file, _at_least_0, len(curve)),
        num_problems=[int(n) for n in _numbers(row, "num_problems", file, _count, len(curve))],
        energy_available=_numbers(row, "energy_available", file, _share, len(curve)),
        energy_claimed=_numbers(row, "energy_claimed", file, _share, len(curve)),
        claim_fraction=float(claim_fraction),
        settings=settings,
    )


def _numbers(
    row: Mapping[str, Any], name: str, file: Path, fits: Callable[[float], bool], length: int | None = None
) -> list[float]:
    values = row.get(name)
    if not isinstance(values, list):
        raise UserError(f"{file}: '{name}' must be a list, found {type(values).__name__}", REMEDY)
    for place, value in enumerate(values, start=1):
        if not _number(value) or not fits(value):
            raise UserError(f"{file}: '{name}' has {value!r} at step {place}", REMEDY)
    if length is not None and len(values) != length:
        raise UserError(f"{file}: '{name}' has {len(values)} values, 'curve' has {length}", REMEDY)
    return [float(value) for value in values]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _at_least_0(value: float) -> bool:
    return value >= 0


def _count(value: float) -> bool:
    return value >= 1 and value == int(value)


def _share(value: float) -> bool:
    return 0 <= value <= 1


def _model(row: Mapping[str, Any], file: Path) -> ModelIdentity:
    model = row.get("model")
    try:
        made = ModelIdentity(**model)  # type: ignore[arg-type]
    except TypeError as error:
        raise UserError(f"{file}: 'model' must have name, revision and fingerprint, found {model!r}", REMEDY) from error
    for key in ("name", "fingerprint"):
        if not isinstance(getattr(made, key), str):
            raise UserError(f"{file}: 'model' has {key} {getattr(made, key)!r}, expected text", REMEDY)
    return made
