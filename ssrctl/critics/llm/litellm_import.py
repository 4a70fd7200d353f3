"""The only import of litellm: late, without network access, and silent."""

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
    """Import and return ``litellm``; called only when it is needed, since the import takes seconds.

    Its price table is the installed one. It prints and logs nothing: its debug log quotes requests with the texts under
    judgement, and sometimes keys.

    Raises:
        UserError: litellm is not installed, or the installed version cannot be imported.
    """
    for name in LOCAL_TABLES:
        os.environ[name] = "True"
    try:
        import litellm
    except ModuleNotFoundError as error:
        if error.name != "litellm":
            raise _broken(error) from error
        raise UserError("the llm critic needs litellm", "pip install 'ssrctl[critic]'") from error
    except Exception as error:  # its import runs a lot of code
        raise _broken(error) from error
    litellm.suppress_debug_info = True
    litellm.set_verbose = False
    litellm.telemetry = False
    # Comes from a request that is cancelled before litellm awaits its own coroutine; it is harmless.
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
