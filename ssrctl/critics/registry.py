"""The registry of critics: the built-in values of ``--critic`` and the class behind each."""

from __future__ import annotations

import pkgutil
from typing import Any

from ssrctl.configs import CriticOptions, own_code
from ssrctl.critics.base import Critic, CriticResources
from ssrctl.critics.own_code import load, make_own_critic

# Each class has a class method create(options, resources). Its module is imported only when the critic is chosen.
CRITICS = {
    "rule": "ssrctl.critics.rule:RuleCritic",
    "llm": "ssrctl.critics.llm.critic:LLMCritic",
    "rollout": "ssrctl.critics.rollout:RolloutCritic",
    "prm": "ssrctl.critics.prm.critic:PRMCritic",
}


def make_critic(options: CriticOptions, resources: CriticResources | None = None) -> Critic:
    """Return the critic that ``options.critic`` names.

    Raises:
        UserError: the critic lacks a key, a package, a rubric or a model; or it is a user's, and cannot be made.
    """
    kind, resources = find_critic(options.critic), resources or CriticResources()
    if options.critic not in CRITICS:
        return make_own_critic(options.critic, kind, options, resources)
    made: Critic = kind.create(options, resources)
    return made


def find_critic(name: str) -> Any:
    """Import the class of a critic, built in or a user's.

    Raises:
        UserError: a user's class cannot be imported.
    """
    return pkgutil.resolve_name(CRITICS[name]) if name in CRITICS else load("critic", name, own_code.CRITICS)
