"""The one place that imports litellm: late, without network, and silent."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from typing import Any

from ssrctl.errors import UserError

# Tables that litellm would otherwise fetch from the internet when it is imported or first used.
LOCAL_TABLES = ("LITELLM_LOCAL_MODEL_COST_MAP", "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS")
LOGGERS = ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy")


@functools.cache
def import_litellm() -> Any:
    """The module ``litellm``; the import takes seconds, so nothing imports it before it is needed.

    Its price table is the one that it was installed with. It prints and logs nothing: its debug log quotes requests,
    hence the texts under judgement, and sometimes keys.

    Raises:
        UserError: litellm is not installed, or what is installed cannot be imported.
    """
    for name in LOCAL_TABLES:
        os.environ[name] = "True"
    try:
        import litellm
    except ModuleNotFoundError as error:
        if error.name != "litellm":
            raise _broken(error) from error
        raise UserError("the llm critic needs litellm", "pip install 'ssrctl[critic]'") from error
    except Exception as error:  # its import runs a great deal of code
        raise _broken(error) from error
    litellm.suppress_debug_info = True
    litellm.set_verbose = False
    litellm.telemetry = False
    # A request that is cancelled before litellm awaits its own coroutine; there is nothing to do about it.
    warnings.filterwarnings("ignore", message=r"coroutine '.*acompletion' was never awaited", category=RuntimeWarning)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.CRITICAL + 1)
        logger.propagate = False
    return litellm


def _broken(error: Exception) -> UserError:
    return UserError(
        f"litellm is installed but cannot be imported: {type(error).__name__}: {error}",
        "pip install --upgrade 'ssrctl[critic]'",
    )
