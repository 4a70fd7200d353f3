"""Budget profiles: how much gradient later steps still find, as json (SSR section 2.3.3)."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Interval
from pydantic import StrictInt

from ssrctl.core.budget import step_budgets, step_weights
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity
from ssrctl.io.checked import Finite, checked
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
    curve: list[Annotated[Finite, Ge(0)]]
    std: list[Annotated[Finite, Ge(0)]]
    num_problems: list[Annotated[StrictInt, Ge(1)]]
    energy_available: list[Annotated[Finite, Interval(ge=0, le=1)]]
    energy_claimed: list[Annotated[Finite, Interval(ge=0, le=1)]]
    claim_fraction: Annotated[Finite, Interval(gt=0, lt=1)]
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> dict[str, dict[str, list[float]]]:
        """Return weights w_i and budgets k_i (with B = 5%, k_max = 1%) for some numbers of steps, for human readers."""
        return {
            str(steps): {"w": step_weights(self.curve, steps), "k": step_budgets(self.curve, steps)}
            for steps in TABLE_STEPS
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the json object of the file."""
        return {"format": FORMAT, "version": VERSION} | asdict(self) | {"table": self.table()}


def save_budget_profile(path: str | Path, profile: BudgetProfile) -> None:
    """Write ``profile``, whole or not at all; a value that is not finite is a ValueError."""
    write_text(path, json.dumps(profile.to_dict(), indent=1, allow_nan=False) + "\n")


def load_budget_profile(path: str | Path) -> BudgetProfile:
    """Read a profile and check every field.

    The ``table`` is for human readers and is not read: budgets are computed from the curve.

    Raises:
        UserError: a missing or truncated file, another format or version, or a field that is absent or outside its
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
    profile = checked(BudgetProfile, {"settings": None} | row, str(file), REMEDY)  # settings are needed in a file
    if not profile.curve or not math.isclose(profile.curve[0], 1.0, abs_tol=1e-9):
        raise UserError(f"{file}: 'curve' must begin with v_1 = 1, found {profile.curve[:1]}", REMEDY)
    for name in ("std", "num_problems", "energy_available", "energy_claimed"):
        if len(values := getattr(profile, name)) != len(profile.curve):
            raise UserError(f"{file}: '{name}' has {len(values)} values, 'curve' has {len(profile.curve)}", REMEDY)
    return profile
