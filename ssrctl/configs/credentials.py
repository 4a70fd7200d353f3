"""Recognition of credentials in settings, which are stored in manifests and shown in messages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote_plus, urlsplit

from ssrctl.errors import UserError

# Text that looks like a key, wherever it occurs.
KEY_TEXT = re.compile(r"(?i)\bbearer\s+\S+|\b(?:sk|pk|rk|gsk|xai|hf)[-_][\w*.-]{6,}|\bAIza[\w-]{20,}")

# Not every token is a credential: max_tokens, stop_token, prompt_cache_key are settings of sampling.
_CREDENTIAL_NAME = re.compile(
    r"""(?ix)
    ^ (key | token | sig | code | auth | jwt | pwd | pass | credentials?) $
    | api[-_.]?key | (^|[-_.]) sig $ | signature | secret | passw | passphrase | credential | authorization | bearer
    | (access | auth | api | id | refresh | session | security | hf | user | client) [-_.]? token
    | (access | account | auth | client | master | private | signing | subscription | functions?) [-_.]? key
    """
)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def names_credential(name: str) -> bool:
    """Return True for a name under which programs expect a key, a password or a signature."""
    return _CREDENTIAL_NAME.search(_CAMEL.sub("_", name.strip())) is not None


def credential_in_json(value: Any) -> str | None:
    """Return the name under which a json value holds a credential, at any depth; None without one."""
    for name, inner in _named_values(value):
        if names_credential(name) or (isinstance(inner, str) and KEY_TEXT.search(inner)):
            return name
    return None


def credential_in_address(address: str) -> str | None:
    """Return the place of a credential in an address, in words that do not hold it; None without one.

    Raises:
        ValueError: not an address.
    """
    url = urlsplit(address)
    if "@" in url.netloc:
        return "a user name or password"
    for part in re.split("[&;]", f"{url.query}&{url.fragment}"):
        name, _, value = map(unquote_plus, part.partition("="))
        if value and names_credential(name):
            return f"a key in its query ({name.strip()}=...)"
    return "a key" if KEY_TEXT.search(unquote_plus(address)) else None


def check_address(setting: str, address: str, *, variable: str, example: str) -> None:
    """Check a setting that is the address of a server, before it is stored or shown.

    Args:
        setting: the flag, for errors.
        address: its value.
        variable: the environment variable that a key belongs in.
        example: an address of the wanted kind.

    Raises:
        UserError: a credential in the address, or not one of http or https; the address itself is not shown.
    """
    try:
        url = urlsplit(address)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        credential = credential_in_address(address)
    except ValueError:
        usable, credential = False, None
    if credential is not None:
        raise UserError(f"{setting} must not contain {credential}", f"leave it out and set the variable {variable}")
    if not usable:
        raise UserError(f"{setting} is not the address of a server", f"give an address such as {example}")


def key_in(variable: str) -> str:
    """Return the key in an environment variable; an empty text if it is not set.

    Raises:
        UserError: it cannot be a key; its text is not shown.
    """
    value = os.environ.get(variable, "")
    if value.strip() != value or not value.isascii() or not value.isprintable():
        raise UserError(
            f"{variable} cannot be a key: it contains a space, a line end or a non-ASCII character",
            f"set {variable} again",
        )
    return value


def _named_values(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    yield name, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _named_values(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _named_values(inner, name)
