import json
from pathlib import Path
from typing import Any

import pytest

from ssrctl.core.budget import step_budgets
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity
from ssrctl.io.budget_file import BudgetProfile, load_budget_profile, save_budget_profile
from ssrctl.io.package_data import profiles_dir

PROFILE = BudgetProfile(
    model=ModelIdentity(name="org/model", revision=None, fingerprint="xxh3:00"),
    curve=[1.0, 0.5, 0.25],
    std=[0.0, 0.1, 0.2],
    num_problems=[8, 8, 3],
    energy_available=[1.0, 0.75, 0.5],
    energy_claimed=[0.9, 0.5, 0.25],
    claim_fraction=0.01,
    settings={"seed": 0},
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "p.json"
    save_budget_profile(path, PROFILE)
    assert load_budget_profile(path) == PROFILE


def test_table_gives_later_steps_the_larger_share() -> None:
    table = PROFILE.table()
    assert list(table) == ["1", "2", "4", "8", "16", "24"]
    # w is proportional to 1/v with the last value held: 1, 2, 4, 4 of 11.
    assert table["4"]["w"] == pytest.approx([1 / 11, 2 / 11, 4 / 11, 4 / 11], rel=1e-6)
    assert table["4"]["k"] == pytest.approx([0.05 / 11, 0.1 / 11, 0.01, 0.01], rel=1e-6)
    assert table["8"]["k"] == step_budgets(PROFILE.curve, 8)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "version"),
        ({"curve": []}, "curve"),
        ({"curve": None}, "curve"),
        ({"curve": [0.9, 0.5, 0.25]}, "curve"),
        ({"curve": [1.0, -0.5, 0.25]}, "curve"),
        ({"curve": [1.0, "x", 0.25]}, "curve"),
        ({"curve": [1.0, True, 0.25]}, "curve"),
        ({"curve": [1.0, float("nan"), 0.25]}, "curve"),
        ({"std": [0.0, 0.1]}, "std"),
        ({"std": [0.0, -0.1, 0.2]}, "std"),
        ({"num_problems": [8, 8, 0]}, "num_problems"),
        ({"num_problems": [8, 8, 1.5]}, "num_problems"),
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
    path.write_text(json.dumps(PROFILE.to_dict() | changes))
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


@pytest.mark.parametrize("name", ["tiny-reasoner", "smollm2-135m-instruct"])
def test_shipped_profiles(name: str) -> None:
    path = profiles_dir() / "budgets" / f"{name}.json"
    profile = load_budget_profile(path)
    assert profile.model.name.lower() == name
    assert len(profile.curve) > 1
    assert json.loads(path.read_text())["table"] == profile.table()
    assert "/" not in json.dumps(profile.settings)
