"""Worker process for symbolic algebra: one comparison per line in, one verdict per line out.

Run as ``python -m ssrctl.text.answer_worker`` by ``answer_pool``. Lines are json: ``{"extracted": ...,
"reference": ..., "seconds": 11.0}`` in, ``{"same": true}`` out; the first line out is ``{"ready": true}``, or
``{"error": ...}`` when math-verify cannot be imported. The process ends when its input does.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from ssrctl.text.answer_equality import decide
from ssrctl.text.answer_numbers import Number, read_number

# Address space. All imports take 0.06 GiB; a power tower asks for all memory.
MEMORY_LIMIT_BYTES = 2 * 2**30
PRECISION = 60  # digits to which constants are compared; half of them must agree


def main() -> None:
    """Serve comparisons until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C and `timeout` reach the whole group; the parent decides
    _prepare_alarm()
    _limit_memory()
    # Output of libraries must not get between the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        same = _comparison()
        same("x^2 + 2x + 1", "(x + 1)^2")  # first-use imports must not count as comparison time
    except ImportError as error:
        reply({"error": str(error)})
        return
    reply({"ready": True})
    for line in sys.stdin.buffer:
        job = json.loads(line)
        # The parent kills a worker that times out. If the parent itself was killed, this timer ends the process,
        # even inside one long operation on huge integers.
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])
        verdict = same(job["extracted"], job["reference"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply({"same": verdict})


def _prepare_alarm() -> None:
    """Let SIGALRM end the process, also if the parent ignored or blocked it."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


def _limit_memory() -> None:
    """Limit the address space, so that a bomb raises MemoryError; macOS has no such limit."""
    import resource

    if not sys.platform.startswith("linux"):
        return

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _comparison() -> Callable[[str, str], bool]:
    """Return a function (extracted, reference) -> True if the answers are equal, by math-verify where needed."""
    import math_verify
    import sympy

    # It warns that its own timeouts are off, and reports what it cannot parse.
    logging.disable(logging.CRITICAL)
    usual = math_verify.LatexExtractionConfig()
    # Only as LaTeX: the other reader picks the first number out of unparsable text ("not 5" is 5). Units are
    # removed before: math-verify's list of units also removes the letters of 3ab and 2d.
    normalization = dataclasses.replace(usual.normalization_config, units=False)
    configs = (dataclasses.replace(usual, normalization_config=normalization),)

    def parsed(text: str) -> list[Any]:
        bare = text.replace("$", " ").strip()
        expressions: list[Any] = math_verify.parse(f"${bare}$", extraction_config=configs, parsing_timeout=None)
        return expressions

    def constant(expressions: list[Any]) -> Any | None:
        """Return the value of a parsed constant to ``PRECISION`` digits, or None."""
        first = expressions[0] if expressions else None
        if not isinstance(first, sympy.Expr) or first.free_symbols or not first.is_number or first.has(sympy.Float):
            return None
        value = sympy.N(first.doit(), PRECISION)
        return value if value.is_number and value.is_finite else None

    def algebra(extracted: str, reference: str) -> bool:
        gold, answer = parsed(reference), parsed(extracted)
        values = []
        for text, expressions in ((extracted, answer), (reference, gold)):
            number = read_number(text)
            value = constant(expressions)
            values.append(number if number is not None and number.unit is not None else value)
        mine, theirs = values
        if mine is not None and theirs is not None:
            return _same_constants(mine, theirs)
        return bool(math_verify.verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None))

    return lambda extracted, reference: decide(extracted, reference, algebra) is True


def _same_constants(mine: Any, theirs: Any) -> bool:
    """Compare two values of ``PRECISION`` digits; one may be a decimal, which the other must round to."""
    if isinstance(mine, Number) and isinstance(theirs, Number):
        return mine.equals(theirs)
    if isinstance(mine, Number) or isinstance(theirs, Number):
        decimal, value = (mine, theirs) if isinstance(mine, Number) else (theirs, mine)
        return bool(value.is_real) and decimal.rounds(Fraction(str(value)))
    return bool(abs(mine - theirs) <= abs(theirs) * 10 ** -(PRECISION // 2))


if __name__ == "__main__":
    main()
