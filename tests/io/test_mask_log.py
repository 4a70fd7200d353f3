"""Mask logs: what was added to them survives the file, older ones are read, and wrong types are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssrctl.core.mask import BlockMask
from ssrctl.errors import UserError
from ssrctl.io.mask_log import CONFLICTS, QuestionLog, StepMaskLog, UnitLog, load_mask_log, save_mask_log

SHAPES = {"w": (300, 400), "empty": (0, 3), "b": (5,)}  # w has two blocks of 65,536


def mask(*indices: int) -> BlockMask:
    return BlockMask.from_indices(SHAPES, {"w": torch.tensor(indices, dtype=torch.int64), "b": torch.tensor([4])})


def log() -> StepMaskLog:
    first = UnitLog(
        steps=[0],
        budget=0.01,
        advantages=[0.5, -0.25],
        mask=mask(1, 70_000),
        gradient_norm=2.5,
        captured=0.25,
        unconstrained=mask(0, 65_535, 65_536, 119_999),
        unconstrained_captured=0.5,
    )
    second = UnitLog(steps=[1, 2], budget=0.02, advantages=[], mask=mask(3))
    conflict = {name: [[None, 0.1 * i], [0.1 * i, None]] for i, name in enumerate(CONFLICTS)}
    question = QuestionLog(id="q", units=[first, second], gradient_cosine=[[1.0, -0.5], [-0.5, 1.0]], conflict=conflict)
    return StepMaskLog(step=3, num_coordinates=120_005, num_protected=7, questions=[question])


def rewrite(path: Path, change: Any) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    questions = json.loads(metadata["questions"])
    change(questions, tensors, metadata)
    save_file(tensors, path, metadata=metadata | {"questions": json.dumps(questions)} if questions else metadata)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_mask_log(tmp_path / "000003.safetensors", log())
    return tmp_path / "000003.safetensors"


def indices(found: BlockMask | None) -> dict[str, list[int]]:
    assert found is not None and found.shapes == SHAPES
    return {name: chosen.tolist() for name, chosen in found.to_indices().items()}


def test_everything_survives_the_file(path: Path) -> None:
    found, wanted = load_mask_log(path), log()
    assert (found.step, found.num_coordinates, found.num_protected) == (3, 120_005, 7)
    [question], [expected] = found.questions, wanted.questions
    assert (question.id, question.gradient_cosine, question.conflict) == (
        "q",
        expected.gradient_cosine,
        expected.conflict,
    )
    first, second = question.units
    assert (first.gradient_norm, first.captured, first.unconstrained_captured) == (2.5, 0.25, 0.5)
    assert indices(first.mask) == {"w": [1, 70_000], "empty": [], "b": [4]}
    assert indices(first.unconstrained) == {"w": [0, 65_535, 65_536, 119_999], "empty": [], "b": [4]}
    assert second.unconstrained is second.captured is second.gradient_norm is second.unconstrained_captured is None
    assert (second.steps, second.budget, second.advantages) == ([1, 2], 0.02, [])


def change_question(**fields: Any) -> Any:
    return lambda questions, tensors, metadata: questions[0].update(fields)


def change_unit(**fields: Any) -> Any:
    return lambda questions, tensors, metadata: questions[0]["units"][0].update(fields)


def change_tensor(name: str, value: Tensor) -> Any:
    return lambda questions, tensors, metadata: tensors.update({f"free.0.0.{name}": value})


DAMAGES = {
    r"questions\[0\].id' must be a valid string, found 5": change_question(id=5),
    r"questions\[0\].units' must be a valid list": change_question(units={}),
    r"questions\[0\].units\[0\]' must be a dictionary": change_question(units=[3]),
    "gradient_cosine does not fit 2 units": change_question(gradient_cosine=[[1.0]]),
    r"gradient_cosine\[0\]' must be a valid list": change_question(gradient_cosine=[1.0, 2.0]),
    r"gradient_cosine\[0\]\[1\]' must be a valid number, found None": change_question(
        gradient_cosine=[[1.0, None], [None, 1.0]]
    ),
    r"gradient_cosine\[0\]\[1\]' must be a valid number, found 'x'": change_question(
        gradient_cosine=[[1.0, "x"], ["x", 1.0]]
    ),
    "conflict' must be a valid dictionary": change_question(conflict=[]),
    "conflict holds .'other'., expected": change_question(conflict={"other": []}),
    "top_conflict does not fit 2 units": change_question(
        conflict={name: [[None, 0.0], [0.0, None]] for name in CONFLICTS} | {"top_conflict": []}
    ),
    r"units\[0\].captured' is missing": lambda questions, *_: questions[0]["units"][0].pop("captured"),
    "steps' must be a valid list": change_unit(steps="0"),
    r"steps\[0\]' must be a valid integer, found 0.5": change_unit(steps=[0.5]),
    r"steps\[0\]' must be greater than or equal to 0, found -1": change_unit(steps=[-1]),
    "budget' must be a valid number, found 'much'": change_unit(budget="much"),
    "budget' must be a valid number, found True": change_unit(budget=True),
    r"advantages\[0\]' must be a valid number, found None": change_unit(advantages=[None]),
    "captured' must be a valid number": change_unit(captured="all"),
    "advantages' is missing": lambda questions, tensors, metadata: questions[0]["units"][0].pop("advantages"),
    "'step' must be a valid integer, found 1.5": lambda questions, tensors, metadata: metadata.update(step="1.5"),
    "'num_coordinates' must be a valid integer": lambda questions, tensors, metadata: metadata.update(
        num_coordinates='"many"'
    ),
    "'num_protected' must be greater than or equal to 0, found -1": lambda questions, tensors, metadata: (
        metadata.update(num_protected="-1")
    ),
    "'free.0.0.w.low' is absent": lambda questions, tensors, metadata: tensors.pop("free.0.0.w.low"),
    "free.0.0.w does not hold a set": change_tensor("w.counts", torch.tensor([3, 2], dtype=torch.int32)),
    "free.0.0.w does not": change_tensor("w.counts", torch.tensor([-1, 5], dtype=torch.int32)),
    "free.0.0.b does not hold a set": change_tensor("b.low", torch.tensor([4])),
    "strictly ascending": change_tensor("w.low", torch.tensor([1, 1, 2, 3], dtype=torch.int16)),
    "outside a tensor of 5": change_tensor("b.low", torch.tensor([5], dtype=torch.int16)),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_damaged_logs_are_user_errors(path: Path, said: str) -> None:
    rewrite(path, DAMAGES[said])
    with pytest.raises(UserError, match=said) as caught:
        load_mask_log(path)
    assert str(caught.value).startswith(str(path)) and caught.value.remedy


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "units", "steps"]), inner),
    max_leaves=6,
)
PLACES = ["questions", "id", "units", "gradient_cosine", "conflict", "steps", "budget", "advantages", "captured"]


@given(st.sampled_from(PLACES), json_values)
def test_whatever_a_log_holds_it_is_read_or_refused(tmp_path: Path, place: str, value: Any) -> None:
    path = tmp_path / "000003.safetensors"
    save_mask_log(path, log())

    def change(questions: Any, tensors: Any, metadata: Any) -> None:
        if place == "questions":
            metadata["questions"] = json.dumps(value)
            questions.clear()  # leaves the metadata's own
        else:
            (questions[0] if place in questions[0] else questions[0]["units"][1])[place] = value

    rewrite(path, change)
    try:
        found = load_mask_log(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert found.step == 3
