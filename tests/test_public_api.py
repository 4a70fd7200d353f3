"""What ``import ssrctl`` offers and costs, and that docs/optimizer.md is right about it."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ssrctl
from ssrctl import BlockMask, KronosOpt

DOCS = Path(__file__).parent.parent / "docs"
# The names of docs/api.md, which are the public ones, and their modules.
LISTED = re.findall(r"^::: (\S+)\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
HOMES = {name: module for module, name in LISTED}


def run(code: str) -> list[str]:
    """What a fresh interpreter prints, by line."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_package_and_its_light_names_load_no_torch() -> None:
    code = (
        "import sys, ssrctl\n"
        "print('torch' in sys.modules, ssrctl.__version__, *dir(ssrctl))\n"
        "from ssrctl import segment, two_level_advantages\n"
        "better, worse = two_level_advantages([[1.0, 0.0]]).values[0]\n"
        "print('torch' in sys.modules, segment('One.\\nTwo.')[1].start, round(better, 6), round(worse, 6))\n"
        "from ssrctl import KronosOpt\n"
        "print('torch' in sys.modules, KronosOpt.__mro__[1].__name__)\n"
    )
    first, second, third = run(code)
    assert first.split()[:2] == ["False", ssrctl.__version__]
    assert set(first.split()[2:]) >= HOMES.keys()
    assert second == "False 5 1.0 -1.0"
    assert third == "True Optimizer"


def test_a_star_import_gives_every_public_name() -> None:
    names: dict[str, object] = {}
    exec("from ssrctl import *", names)
    assert names.keys() - {"__builtins__"} == {*HOMES, "__version__"}


@pytest.mark.parametrize("name", sorted(HOMES))
def test_a_public_name_is_the_object_that_its_module_defines(name: str) -> None:
    found = getattr(ssrctl, name)
    assert found is getattr(sys.modules[HOMES[name]], name)
    assert found.__module__ == HOMES[name]


def test_what_is_not_there_is_an_attribute_error_that_names_what_is() -> None:
    with pytest.raises(AttributeError, match=r"'ssrctl' has no attribute 'Kronos'.*KronosOpt"):
        _ = ssrctl.Kronos  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="Kronos"):
        exec("from ssrctl import Kronos")
    assert not hasattr(ssrctl, "_no_such_name")


# A change here breaks the programs of users: it needs a major version and a line in the changelog.
SIGNATURES = {
    "check_answer": "response reference extraction timeout",
    "make_critic": "options resources",
    "missing": "error rationale",
    "read_rollouts": "path needs on_torn",
    "score_all": "critic rollouts",
    "scored": "score kind rationale",
    "segment": "text style max_steps min_chars max_chars",
    "train": "config critic rewards",
    "write_rollouts": "path rollouts",
    "Rollout": "id question answer prompt response steps scores final advantages extra",
    "StepScore": "score reward rationale error",
    "StepSpan": "start end kind",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_are_typed_and_stay(name: str) -> None:
    signature = inspect.signature(getattr(ssrctl, name))
    assert " ".join(signature.parameters) == SIGNATURES[name]
    assert all(one.annotation is not one.empty for one in signature.parameters.values())


def test_submodules_are_imported_as_from_any_package() -> None:
    assert run("from ssrctl import errors\nprint(errors.__name__)") == ["ssrctl.errors"]


def test_type_checkers_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING, the lazy table and ``__all__`` agree."""
    tree = ast.parse(Path(ssrctl.__file__).read_text(encoding="utf-8"))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == HOMES
    assert set(ssrctl.__all__) == {*HOMES, "__version__"}


# docs/optimizer.md

PAGE = (DOCS / "optimizer.md").read_text(encoding="utf-8")


def small_model() -> torch.nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Linear(60, 50)


def loss_of(model: torch.nn.Module, row: int = 0) -> torch.Tensor:
    inputs = torch.linspace(-1, 1, 60 * 8).view(8, 60)
    return model(inputs[row : row + 1]).square().sum()


def test_the_code_on_the_page_runs() -> None:
    model = small_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    questions = [[loss_of(model, 0), loss_of(model, 1)], [loss_of(model, 2)]]
    claimed, protected = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {"model": model, "questions": questions}
    exec(claimed, names)
    changed = sum(int((p != before[name]).sum()) for name, p in model.named_parameters())
    assert 30 < changed <= names["stats"].num_updated <= 3 * 30  # 1% of 3,050 coordinates for each of three units
    exec(protected, names)
    assert names["optimizer"].num_protected == names["mask"].count() == 1_000


def begun(units: object = None, **settings: object) -> tuple[torch.nn.Linear, KronosOpt]:
    model = small_model()
    optimizer = KronosOpt(model.named_parameters(), lr=0.1, **settings)
    optimizer.begin_question(units)
    return model, optimizer


def claim(units: object = None, k: int | None = None, backward: int = 1, num_claims: int = 1, **settings: object):
    """The model and the optimizer after so many backward passes and claims."""
    model, optimizer = begun(units, **settings)
    for _ in range(num_claims):
        for _ in range(backward):
            loss_of(model).backward()
        optimizer.claim(k)
    return model, optimizer


def two_names_of_one_parameter() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    KronosOpt([("a", weight), ("b", weight)], lr=0.1)


def two_models() -> None:
    KronosOpt([*small_model().named_parameters(), *small_model().named_parameters()], lr=0.1)


def not_contiguous() -> None:
    KronosOpt([("w", torch.nn.Parameter(torch.zeros(3, 4).t()))], lr=0.1)


def unclaimed() -> None:
    model, optimizer = begun(1)
    loss_of(model).backward()
    optimizer.step()


def left_over() -> None:
    model = small_model()
    loss_of(model).backward()
    KronosOpt(model.named_parameters(), lr=0.1).begin_question(1)


def not_a_number() -> None:
    model, optimizer = begun(1)
    (loss_of(model) * float("nan")).backward()
    optimizer.claim()


def of_another_rule() -> None:
    saved = KronosOpt(small_model().named_parameters(), lr=0.1, update_rule="adam").state_dict()
    KronosOpt(small_model().named_parameters(), lr=0.1).load_state_dict(saved)


REFUSED: dict[str, Callable[[], object]] = {
    "KronosOpt needs (name, parameter) pairs": lambda: KronosOpt(small_model().parameters(), lr=0.1),
    "a parameter came under two names": two_names_of_one_parameter,
    "two parameters have the same name": two_models,
    "is not contiguous in memory": not_contiguous,
    "the protected mask is over other tensors": lambda: begun(protected=BlockMask.empty({"weight": (50, 60)})),
    "claim() before begin_question()": lambda: KronosOpt(small_model().named_parameters(), lr=0.1).claim(3),
    "claim() found no gradient": lambda: claim(1, backward=0),
    "begin_question() with": left_over,
    "no budget is planned for this unit": lambda: claim(1, num_claims=2),
    "the question ends with an unclaimed gradient": unclaimed,
    "values that are NaN or infinite": not_a_number,
    "claim() found nothing that was selected during a backward pass": lambda: claim(scope="tensor", k=3),
    "got a second gradient in one unit": lambda: claim(1, backward=2, scope="tensor"),
    "needs whole gradients, which scope 'tensor' drops at once": lambda: begun(scope="tensor", allocation="pooled"),
    "state_dict() with claims that wait to be applied": lambda: claim(1)[1].state_dict(),
    "the state is of the update rule": of_another_rule,
    "KronosOpt takes no closure": lambda: begun()[1].step(lambda: 0.0),
}


def test_the_page_lists_these_refusals() -> None:
    table = PAGE.partition("## Error messages")[2]
    assert set(re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)) == REFUSED.keys()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("message", REFUSED)
def test_a_refusal_says_what_the_page_says(message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
        REFUSED[message]()
