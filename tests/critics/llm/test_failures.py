"""Reading the failures of requests: what a server asks to wait, and texts without keys."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.critics.llm.failures import MAX_DETAIL_CHARS, MIN_SECRET_CHARS, redact, retry_after

NOW = 1_750_000_000.0  # 2025-06-15T15:06:40Z


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "Sun, 15 Jun 2025 15:07:10 GMT"}, 30.0),
        ({"retry-after": "Sun, 15 Jun 2025 15:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, float("inf")),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after-ms": "x", "retry-after": "Sun, 15 Jun 2025 15:07:10 GMT"}, 30.0),
        ({"retry-after-ms": "x"}, None),
        ({"retry-after": "Sun, 15 Jun 99999999999 15:07:10 GMT"}, None),
    ],
)
def test_retry_after(headers, seconds):
    assert retry_after(headers, NOW) == seconds


KEYS = st.text(string.ascii_letters + string.digits + "-_.", min_size=MIN_SECRET_CHARS, max_size=60)


@given(first=KEYS, second=KEYS, before=st.text(max_size=30), after=st.text(max_size=30))
def test_no_key_of_the_environment_is_left(first, second, before, after):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_API_KEY", first)
        patch.setenv("OTHER_TOKEN", first[:MIN_SECRET_CHARS])  # begins another
        patch.setenv("THIRD_SECRET", f" {second}\n")
        shown = redact(f"{before}{first} {second}{after}")
    without = f"{before}{after}"
    for key in (first, second):
        assert key not in shown or key in " ".join(without.split())
    if first not in without:
        rest = first[MIN_SECRET_CHARS:]
        assert len(rest) < MIN_SECRET_CHARS or rest in f"{without}{second}" or rest not in shown


def test_what_looks_like_a_key_is_taken_out():
    text = redact("Incorrect key sk-proj-****abcd, header 'Bearer xyz', gsk_a1b2c3d4, not risk-averse")
    assert text == "Incorrect key ***, header '*** ***, not risk-averse"


@given(st.text(max_size=2000))
def test_details_are_one_short_printable_line(text):
    shown = redact(text)
    assert len(shown) <= MAX_DETAIL_CHARS and shown.isprintable() and shown == " ".join(shown.split())
