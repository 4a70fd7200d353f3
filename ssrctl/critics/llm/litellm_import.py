"""The only import of litellm: late, without network access, and silent."""

from __future__ import annotations

import contextlib
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


async def warm_up(router: Any, model: str) -> None:
    """Let litellm do the work of a first call, about a second of imports, without sending anything.

    A call's time limit would include it otherwise.

    Args:
        router: litellm's Router.
        model: name of one of its models.
    """
    import openai

    messages = [{"role": "user", "content": "1"}]
    # An answer that is made up here needs no server. A provider without such answers warms up in its first call.
    with contextlib.suppress(Exception):
        await router.acompletion(model=model, messages=messages, max_tokens=1, mock_response="1", **{"no-log": True})
    client = openai.AsyncOpenAI(api_key="none", base_url="http://localhost")
    assert client.chat.completions.with_raw_response is not None  # imported on first use
    await client.close()


def _broken(error: Exception) -> UserError:
    return UserError(
        f"litellm is installed but cannot be imported: {type(error).__name__}: {error}",
        "pip install --upgrade 'ssrctl[critic]'",
    )
