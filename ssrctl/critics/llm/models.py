"""The judge's models: endpoints, keys, and the reply format that each supports."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssrctl.configs import CriticOptions
from ssrctl.configs.credentials import key_in
from ssrctl.critics.llm.litellm_import import import_litellm
from ssrctl.errors import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

NO_KEY = "none"  # own servers need no key, but the SDK requires one
CONNECT_S = 10.0  # a server that accepts no connection for this long is down


@dataclass(eq=False, kw_only=True)
class JudgeModel:
    """One model, and its state in this run.

    Attributes:
        name: litellm name.
        endpoint: its address or provider, for people.
        key_variable: the environment variable of its key, for people.
        parameters: litellm's parameters of every request.
        reply_format: ``response_format`` of its requests: a schema (also on own servers, until one refuses it), else
            json mode, or None where neither is known to work.
        answered: whether it ever gave a reply.
        format_works: whether it ever replied to a request with ``reply_format``.
        num_rejected: prompts that it rejected as malformed before it ever answered.
        failed_in_a_row: prompts that it failed to answer since its last reply.
        cooldown_until: before this time its fallbacks are asked first.
    """

    name: str
    endpoint: str
    key_variable: str
    parameters: dict[str, Any]
    reply_format: Any
    answered: bool = False
    format_works: bool = False
    num_rejected: int = 0
    failed_in_a_row: int = 0
    cooldown_until: float = 0.0


def prepare_models(options: CriticOptions, schema: type[BaseModel] | None) -> list[JudgeModel]:
    """Return the model of ``options`` and its fallbacks, each once.

    ``critic_api_base`` is the endpoint of every model with the first one's provider prefix, since an endpoint speaks
    one provider's protocol; the others use their own provider's endpoint.

    Args:
        options: settings of the llm critic.
        schema: schema of the replies, for models with structured output.

    Raises:
        UserError: a model's provider is not known, or its key is not set or malformed.
    """
    assert options.critic_model is not None
    first = _provider(options.critic_model)
    models = []
    for name in dict.fromkeys([options.critic_model, *options.critic_fallback]):
        provider = _provider(name)
        endpoint = options.critic_api_base if provider == first else None
        key_variable, parameters = _access(name, provider, endpoint)
        models.append(
            JudgeModel(
                name=name,
                endpoint=endpoint or provider,
                key_variable=key_variable,
                parameters=parameters | _request_limits(options.critic_timeout) | _body(name, options),
                reply_format=None if schema is None else _reply_format(name, schema, own=bool(endpoint)),
            )
        )
    return models


def _provider(name: str) -> str:
    litellm = import_litellm()
    try:
        return str(litellm.get_llm_provider(name)[1])
    except litellm.exceptions.BadRequestError:
        pass
    raise UserError(
        f"no provider is known for the critic model '{name}'", "name the provider first, as in openai/gpt-oss-120b"
    )


def _access(name: str, provider: str, endpoint: str | None) -> tuple[str, dict[str, Any]]:
    """Return the environment variables of the model's key, and its parameters."""
    missing = import_litellm().validate_environment(name).get("missing_keys") or []
    # Other credentials, such as those of cloud roles, need not come from the environment.
    missing = missing if all(key.endswith("_API_KEY") for key in missing) else []
    keys = " or ".join(missing) or _key_name(provider)
    parameters: dict[str, Any] = {"model": name}
    if endpoint:
        parameters["api_base"] = endpoint
        if missing:
            parameters["api_key"] = NO_KEY
    elif missing:
        raise UserError(f"no key for {name} is set", f"set {keys}")
    key_in(keys)  # raises for a text that is no key
    return keys, parameters


def _key_name(provider: str) -> str:
    """Return the environment variable of the provider's key; the usual name if none is set."""
    plain = provider.replace("_", "").upper()
    names = (name for name in os.environ if name.endswith("_API_KEY"))
    return next((name for name in names if name.replace("_", "").startswith(plain)), f"{provider.upper()}_API_KEY")


def _request_limits(seconds: float) -> dict[str, Any]:
    import httpx

    return {
        "timeout": httpx.Timeout(seconds, connect=min(0.8 * seconds, CONNECT_S)),
        "drop_params": True,  # some models take no temperature
    }


def _body(name: str, options: CriticOptions) -> dict[str, Any]:
    """Return the reasoning effort and the further entries of each request's body, where they are set."""
    body: dict[str, Any] = {}
    if options.critic_reasoning_effort is not None:
        body["reasoning_effort"] = options.critic_reasoning_effort
        litellm = import_litellm()
        bare, provider, *_ = litellm.get_llm_provider(name)
        listed = litellm.get_supported_openai_params(bare, custom_llm_provider=provider) or ()
        # litellm drops what its table does not list. The user asked for it, so the server is to decide; a fallback may
        # be a model that does not think.
        if name == options.critic_model and "reasoning_effort" not in listed:
            body["allowed_openai_params"] = ["reasoning_effort"]
    if extra := options.critic_extra_body_object:
        body["extra_body"] = extra
    return body


def _reply_format(name: str, schema: type[BaseModel], *, own: bool) -> Any:
    litellm = import_litellm()
    if own or litellm.supports_response_schema(name):
        return schema  # a server that refuses it is asked without it
    # For an unknown model the router adds an empty row to litellm's table.
    known = litellm.model_cost.get(name) or litellm.model_cost.get(name.partition("/")[2])
    listed = litellm.get_supported_openai_params(name) or ()
    return {"type": "json_object"} if known and "response_format" in listed else None
