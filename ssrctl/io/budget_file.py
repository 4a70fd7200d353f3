"""Budget profiles: how much gradient later steps still find, as json (SSR section 2.3.3)."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Interval
from pydantic import StrictInt

from ssrctl.core.budget import RULES, step_budgets, step_weights
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity
from ssrctl.io.checked import Finite, checked
from ssrctl.io.files import existing_file, write_text
from ssrctl.io.hub import artifact_at
from ssrctl.io.package_data import profile_path, shipped_names

FORMAT = "ssrctl-budget-profile"
VERSION = 2
BUDGET_FILE = "budget.json"  # in a repository on the hub
TABLE_STEPS = (1, 2, 4, 8, 16, 24)
REMEDY = "make it again with `ssrctl profile-budget`"
MIN_PROBLEMS = 8


@dataclass(frozen=True, kw_only=True)
class ShareCurve:
    """The curve of rule ``share``: one value per step index.

    Attributes:
        mean: mean over problems of the share of the energy (sum of g^2) of the step's gradient on unprotected
            coordinates that earlier steps left unclaimed, in [0, 1]; v_1 = 1.
        standard_error: of this mean; None for a single problem.
        num_problems: the number of problems in each mean, at least 1.
    """

    mean: list[Annotated[Finite, Interval(ge=0, le=1)]]
    standard_error: list[Annotated[Finite, Ge(0)] | None]
    num_problems: list[Annotated[StrictInt, Ge(1)]]

    def reliable(self) -> list[float]:
        """Return v_1.. up to the first step with fewer than ``MIN_PROBLEMS`` problems; v_1 is 1 by definition."""
        later = itertools.takewhile(
            lambda pair: pair[1] >= MIN_PROBLEMS, zip(self.mean[1:], self.num_problems[1:], strict=True)
        )
        return self.mean[:1] + [mean for mean, _ in later]


@dataclass(frozen=True, kw_only=True)
class MassCurve:
    """The curve of rule ``paper``: one value per step index.

    Attributes:
        mean: mean over problems of the magnitude mass (sum of |g| over the coordinates that the step claimed),
            divided by that of step 1; at least 0, and v_1 = 1.
        std: population standard deviation over these problems, in the same unit.
        num_problems: the number of problems in each mean, at least 1.
    """

    mean: list[Annotated[Finite, Ge(0)]]
    std: list[Annotated[Finite, Ge(0)]]
    num_problems: list[Annotated[StrictInt, Ge(1)]]


@dataclass(frozen=True, kw_only=True)
class BudgetProfile:
    """The curves of both rules and how they were measured.

    Example::

        BudgetProfile(model=ModelIdentity(name="org/model", revision=None, fingerprint="xxh3:..."),
                      share=ShareCurve(mean=[1.0, 0.7], standard_error=[0.0, 0.1], num_problems=[8, 6]),
                      mass=MassCurve(mean=[1.0, 0.8], std=[0.0, 0.1], num_problems=[8, 6]),
                      energy_available=[1.0, 0.7], energy_claimed=[0.88, 0.6], claim_fraction=0.01)

    Attributes:
        model: whose gradients these are.
        share: curve of rule ``share``.
        mass: curve of rule ``paper``.
        energy_available: mean share of the step's squared gradient on coordinates that are neither protected
            nor claimed before it, over all coordinates, in [0, 1]; one value per value of ``mass``.
        energy_claimed: mean share of it on the coordinates that the step itself claimed, in [0, 1].
        claim_fraction: share of the unprotected coordinates that each profiled step claimed.
        settings: what made it.
    """

    model: ModelIdentity
    share: ShareCurve
    mass: MassCurve
    energy_available: list[Annotated[Finite, Interval(ge=0, le=1)]]
    energy_claimed: list[Annotated[Finite, Interval(ge=0, le=1)]]
    claim_fraction: Annotated[Finite, Interval(gt=0, lt=1)]
    settings: dict[str, Any] = field(default_factory=dict)

    def curve(self, rule: str) -> list[float]:
        """Return v_1.. for a budget rule; past its end the last value holds."""
        return self.mass.mean if rule == "paper" else self.share.reliable()

    def table(self) -> dict[str, dict[str, dict[str, list[float]]]]:
        """Return, by rule, weights w_i and budgets k_i (B = 5%, k_max = 1%) for some numbers of steps, for readers."""
        return {
            rule: {
                str(steps): {
                    "w": step_weights(self.curve(rule), steps),
                    "k": step_budgets(self.curve(rule), steps, rule=rule),
                }
                for steps in TABLE_STEPS
            }
            for rule in RULES
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the json object of the file."""
        return {"format": FORMAT, "version": VERSION} | asdict(self) | {"table": self.table()}


def save_budget_profile(path: str | Path, profile: BudgetProfile) -> None:
    """Write ``profile``, whole or not at all; a value that is not finite is a ValueError."""
    write_text(path, json.dumps(profile.to_dict(), indent=1, allow_nan=False) + "\n")


def budget_at(name: str) -> Path:
    """Return the file of a budget profile: ``name`` itself, or the profile that ships or a repository holds by that name.

    ``auto`` and ``flat`` are returned as they are.

    Raises:
        UserError: none of these.
    """
    path = artifact_at(name, BUDGET_FILE)
    return path if name in ("auto", "flat") else profile_path("budgets", str(path), ".json")


def load_budget_profile(path: str | Path) -> BudgetProfile:
    """Read a profile and check every field.

    The ``table`` is for human readers and is not read: budgets are computed from the curves.

    Raises:
        UserError: a missing or truncated file, another format or version, or a field that is absent or outside its
            range; the message names the file and the field.
    """
    file = existing_file(path, "budget profile")
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad utf-8 is a ValueError too
        raise UserError(f"{file}: not valid json: {error}", REMEDY) from error
    if not isinstance(row, dict) or row.get("format") != FORMAT:
        found = row.get("format") if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{file} is not a budget profile: 'format' is {found!r}, expected {FORMAT!r}", REMEDY)
    if row.get("version") != VERSION:
        raise UserError(f"{file}: 'version' is {row.get('version')!r}, this version of ssrctl reads {VERSION}", REMEDY)
    profile = checked(BudgetProfile, {"settings": None} | row, str(file), REMEDY)  # settings are needed in a file
    _check_lengths(profile, str(file))
    return profile


def shipped_budget_profile(fingerprint: str) -> tuple[str, BudgetProfile] | None:
    """Return the name and the profile that ships for the weights with this fingerprint; None if there is none."""
    for name in shipped_names("budgets", ".json"):
        profile = load_budget_profile(profile_path("budgets", name, ".json"))
        if profile.model.fingerprint == fingerprint:
            return name, profile
    return None


def _check_lengths(profile: BudgetProfile, file: str) -> None:
    """Raise a UserError unless curves begin with v_1 = 1 and lists of one curve have one length."""
    lists: dict[str, dict[str, list[Any]]] = {
        "mass": vars(profile.mass)
        | {"energy_available": profile.energy_available, "energy_claimed": profile.energy_claimed},
        "share": vars(profile.share),
    }
    for name, fields in lists.items():
        mean = fields["mean"]
        if not mean or not math.isclose(mean[0], 1.0, abs_tol=1e-9):
            raise UserError(f"{file}: '{name}.mean' must begin with v_1 = 1, found {mean[:1]}", REMEDY)
        for part, values in fields.items():
            if len(values) != len(mean):
                label = part if part.startswith("energy") else f"{name}.{part}"
                raise UserError(f"{file}: '{label}' has {len(values)} values, '{name}.mean' has {len(mean)}", REMEDY)
