"""`ssrctl diagnose`: what updates did, between the steps of a run or between checkpoints."""

from __future__ import annotations

from typing import Any

from ssrctl.configs import DiagnoseConfig
from ssrctl.errors import UserError
from ssrctl.stages.diagnose.checkpoints import diagnose_checkpoints
from ssrctl.stages.diagnose.steps import diagnose_steps


def run(config: DiagnoseConfig) -> dict[str, Any]:
    """Measure, write the page, its json file and its tables, and show the short tables on stdout (unless ``--json``).

    They are called ``diagnose``, of a run over time ``diagnose-run``, of its steps ``diagnose-steps``.

    Returns:
        The report, as in the json file; under ``--dry-run`` the plan.

    Raises:
        UserError: nothing to measure, or inputs that do not fit each other.
        CheckFailed: the report is written, and something that was asserted does not hold.
    """
    _refuse_without_effect(config)
    if config.intervene is not None:
        from ssrctl.stages.diagnose.intervene import run_intervene

        return run_intervene(config)
    return diagnose_steps(config) if config.jaccard else diagnose_checkpoints(config)


def _refuse_without_effect(config: DiagnoseConfig) -> None:
    """Refuse settings without effect; an assertion that nothing checks would pass whatever the weights are."""
    mode = "--jaccard" if config.jaccard else "--intervene" if config.intervene is not None else None
    if mode is None:
        return
    names = [
        "series",
        "pairs",
        "measures",
        "picture",
        "prompts",
        "protect",
        "assert_frozen",
        "assert_moved",
        "exit_code",
    ]
    for name in names + ["layers"] * config.jaccard + ["device"] * (config.device != "cpu"):
        if getattr(config, name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} has no effect with {mode}", f"leave out {flag}, or compare checkpoints with it")
