import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ssrctl.core.budget import step_budgets
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity
from ssrctl.io.budget_file import (
    BudgetProfile,
    MassCurve,
    ShareCurve,
    load_budget_profile,
    save_budget_profile,
    shipped_budget_profile,
)
from ssrctl.io.package_data import profiles_dir

PROFILE = BudgetProfile(
    model=ModelIdentity(name="org/model", revision=None, fingerprint="xxh3:00"),
    share=ShareCurve(mean=[1.0, 0.8, 0.5], standard_error=[0.0, 0.1, None], num_problems=[8, 8, 1]),
    mass=MassCurve(mean=[1.0, 0.5, 0.25], std=[0.0, 0.1, 0.2], num_problems=[8, 8, 3]),
    energy_available=[1.0, 0.75, 0.5],
    energy_claimed=[0.9, 0.5, 0.25],
    claim_fraction=0.01,
    settings={"seed": 0},
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "p.json"
    save_budget_profile(path, PROFILE)
    assert load_budget_profile(path) == PROFILE


@pytest.mark.parametrize(
    ("num_problems", "expected"),
    [
        ([8, 8, 8], [1.0, 0.8, 0.5]),
        ([30, 9, 7], [1.0, 0.8]),
        ([30, 7, 9], [1.0]),
        ([2, 2, 2], [1.0]),  # v_1 is 1 by definition, however few problems there are
    ],
)
def test_the_curve_in_force_ends_where_too_few_problems_were_measured(
    num_problems: list[int], expected: list[float]
) -> None:
    share = ShareCurve(mean=[1.0, 0.8, 0.5], standard_error=[0.0, 0.1, 0.1], num_problems=num_problems)
    assert dataclasses.replace(PROFILE, share=share).curve("share") == expected


def test_table_gives_later_steps_the_larger_share() -> None:
    table = PROFILE.table()
    assert list(table) == ["share", "paper"] and list(table["paper"]) == ["1", "2", "4", "8", "16", "24"]
    # w is proportional to 1/v with the last value held: 1, 2, 4, 4 of 11.
    assert table["paper"]["4"]["w"] == pytest.approx([1 / 11, 2 / 11, 4 / 11, 4 / 11], rel=1e-6)
    assert table["paper"]["4"]["k"] == pytest.approx([0.05 / 11, 0.1 / 11, 0.01, 0.01], rel=1e-6)
    assert table["paper"]["8"]["k"] == step_budgets(PROFILE.mass.mean, 8, rule="paper")
    # 1 and then 1/0.8 = 1.25, of 1 + 7 x 1.25
    assert table["share"]["8"]["k"] == pytest.approx([0.05 / 9.75, *[0.0625 / 9.75] * 7], rel=1e-6)


def test_shipped_profiles_are_found_by_the_weights_they_belong_to() -> None:
    path = profiles_dir() / "budgets" / "tiny-reasoner.json"
    profile = load_budget_profile(path)
    assert shipped_budget_profile(profile.model.fingerprint) == ("tiny-reasoner", profile)
    assert shipped_budget_profile("xxh3:00") is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"format": "other"}, "format"),
        ({"version": 3}, "version"),
        ({"share": None}, "share"),
        ({"share.mean": []}, "share.mean"),
        ({"share.mean": [0.9, 0.8, 0.5]}, "share.mean"),
        ({"share.mean": [1.0, 0.8, 1.1]}, "share.mean"),
        ({"share.standard_error": [0.0, 0.1]}, "share.standard_error"),
        ({"share.standard_error": [0.0, -0.1, 0.2]}, "share.standard_error"),
        ({"share.num_problems": [8, 8]}, "share.num_problems"),
        ({"mass": None}, "mass"),
        ({"mass.mean": []}, "mass.mean"),
        ({"mass.mean": None}, "mass.mean"),
        ({"mass.mean": [0.9, 0.5, 0.25]}, "mass.mean"),
        ({"mass.mean": [1.0, -0.5, 0.25]}, "mass.mean"),
        ({"mass.mean": [1.0, "x", 0.25]}, "mass.mean"),
        ({"mass.mean": [1.0, True, 0.25]}, "mass.mean"),
        ({"mass.mean": [1.0, float("nan"), 0.25]}, "mass.mean"),
        ({"mass.std": [0.0, 0.1]}, "mass.std"),
        ({"mass.std": [0.0, -0.1, 0.2]}, "mass.std"),
        ({"mass.num_problems": [8, 8, 0]}, "mass.num_problems"),
        ({"mass.num_problems": [8, 8, 1.5]}, "mass.num_problems"),
        ({"energy_available": [1.0, 0.75]}, "energy_available"),
        ({"energy_available": [1.0, 0.75, 1.5]}, "energy_available"),
        ({"energy_claimed": None}, "energy_claimed"),
        ({"claim_fraction": 1}, "claim_fraction"),
        ({"claim_fraction": "0.01"}, "claim_fraction"),
        ({"settings": None}, "settings"),
        ({"model": {"name": "x"}}, "model"),
        ({"model": {"name": "x", "revision": None, "fingerprint": "x", "more": 1}}, "model"),
        ({"model": {"name": 3, "revision": None, "fingerprint": "x"}}, "model"),
        ({"model": "x"}, "model"),
    ],
)
def test_every_field_is_checked(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    path = tmp_path / "p.json"
    row = PROFILE.to_dict()
    for key, value in changes.items():
        *parents, last = key.split(".")
        (row[parents[0]] if parents else row)[last] = value
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=rf"p\.json.*'{field}['.[]"):
        load_budget_profile(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\ud800".encode("utf-8", "surrogatepass")])
def test_foreign_files(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"p\.json"):
        load_budget_profile(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="budget profile not found"):
        load_budget_profile(tmp_path / "p.json")


@pytest.mark.parametrize(("name", "num_problems"), [("tiny-reasoner", 16), ("smollm2-135m-instruct", 16)])
def test_shipped_profiles(name: str, num_problems: int) -> None:
    path = profiles_dir() / "budgets" / f"{name}.json"
    profile = load_budget_profile(path)
    assert profile.model.name.lower() == name
    assert profile.share is not None
    assert profile.share.num_problems[0] >= num_problems and len(profile.share.mean) > 1
    assert json.loads(path.read_text())["table"] == profile.table()
    assert "/" not in json.dumps(profile.settings)
