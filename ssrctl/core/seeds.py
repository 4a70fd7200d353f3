"""Seeds that derive from (run seed, purpose, name), so that no draw depends on what was drawn before it."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for ``purpose`` within the run that has ``seed``.

    Equal arguments give equal seeds on every machine; the parts are length-prefixed, so ("ab", "c") and
    ("a", "bc") differ.
    """
    digest = hashlib.sha256()
    for part in (seed, *purpose):
        text = str(part).encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest()[:8], "little") >> 1
