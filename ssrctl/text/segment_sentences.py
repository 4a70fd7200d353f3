"""Sentence starts in running text, also those without punctuation before them."""

from __future__ import annotations

import re

# Upper case of the Latin, Greek and Cyrillic alphabets.
_UPPER = "A-ZÀ-ÖØ-ÞΑ-ΩА-Я"

# One pass per kind of boundary: each pattern begins with a character that the search can skip to, which is several
# times faster than one pattern for all. White space is taken in one piece (possessive), since trying each of its ends
# would be quadratic.
_STOP = re.compile(rf"""[.!?…]["'”’)\]}}*_]{{0,3}}\s++(?=["'“‘(\[*_]{{0,3}}[{_UPPER}一-鿿0-9$\\])""")
_CONNECTIVE = re.compile(r",\s++(?=therefore\b|thus\b|hence\b|consequently\b)")
_SEMICOLON = re.compile(r";\s++(?=\S)")
_WIDE = re.compile(r"""[。！？；।]["'”’」』）》]{0,3}\s*+(?=\S)|，\s*+(?=因此|因而|从而)""")
# No mark at all: "... clips in May Natalia sold ..."
_CAPITAL = re.compile(rf"[{_UPPER}](?<=[^.!?…:;,(\[{{“‘=+/–-]\s[{_UPPER}])(?:[a-z]++|(?=\s[a-z=]))")
# A result, at most three words for its unit, and another calculation: "= 24 clips 24 + 48 = ...", "2x = 24 x = 12".
_CALCULATION = re.compile(
    r"=[ $]{0,2}(?P<result>[^\s=]++)(?P<unit>(?:\s[a-z/]++){0,3})\s++"
    r"(?=[$(]?\d[\d.,]*+%?(?:/\d++|[a-zA-Z])?+(?:\s[a-z]++){0,2}\s?[-+*/×=][\s\w$(<.]|[a-zA-Z]\s?[-+*/×=][\s\w$(<.])"
)

_ABBREVIATION = re.compile(
    r"""(?:^|[("'\[])(?:Mr|Mrs|Ms|Dr|Prof|St|Mt|vs|cf|e\.?g|i\.?e|viz|[Ff]igs?|[Ee]qs?|[Nn]os?|[Vv]ol|[Cc]h|[Tt]hm|[Dd]ef"""
    r"|[Ll]em|[Pp]rop|[Cc]or|approx|ca|[Ss]ec|resp|Jr|Sr|pp?)$"
)
_INITIAL = re.compile(rf"""(?:^|[("'\[.])[{_UPPER}]$""")
_BARE_ENUMERATOR = re.compile(r"\d{1,3}|\(?[a-z]")
_LONGEST_ABBREVIATION = 10


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Written with a capital only where a sentence begins (names and titles apart).
_OPENERS = _words(
    "So Then Therefore Thus Hence Consequently Finally Next Now However But And Or Also Since Because If When While "
    "After Once Altogether Together Meanwhile He She It They We You His Her Its Their Our Your There This That These "
    "Those Each Both Another Suppose Assuming Adding Subtracting Multiplying Dividing Combining Let"
)
# The same, but common in titles and names too: they need a finished calculation before them.
_WEAK_OPENERS = _words("The A An In On At For To Of By With From As All One Every Out Over Before During Not")
# No clause ends with one of these: what follows is still part of it.
_NEVER_LAST = _words(
    "a an the of to for from in on at by with and or than as is are was were be been has have had that which who whose "
    "his her their its my our your per every each if when because so but then he she they we you i into onto under "
    "between after before until since while where about only not no gives equals named called let mr mrs ms dr st like "
    "plus minus times x"
)
# "= 3 Golden Comets" and "= 3 Newtons of force" name a unit; "= 3 Sam has" and "= 3 Sam: 5" begin a sentence.
_NAME_THEN_VERB = re.compile(rf"[{_UPPER}][\w.-]*+(?:['’]s?+)?+(?:,?\s(?:(?P<next>[a-z]++)|=)|(?:\s\d{{1,3}})?:)")
_BARE_ITEM = re.compile(r"[a-z\d]\)")
_LOWER_NEXT = re.compile(r"\w+(?:['’]\w+)?,?\s[^\WA-Z]")
_JOINING = _words("and or of in on at to for from with per by than that as which")
_ENDS_IN_NUMBER = re.compile(r"\d[%)$]?$")


def sentence_starts(text: str, start: int, end: int) -> list[int]:
    """Return starts of the sentences and clauses of ``text[start:end]`` after the first.

    A sentence ends at a full stop, an exclamation or question mark, or their Chinese forms, where a capital,
    a number or mathematics follows; not after an abbreviation, an initial or a bare enumerator, nor inside a
    number. A clause ends at a semicolon and before ", therefore" and its like. Text that runs on without marks
    is cut before a capitalised word that only opens sentences ("So", "She", ...), and, once a result has been
    stated (an ``=`` since the last cut), before any capitalised word that continues in lower case and before a
    new calculation. Takes linear time.
    """
    certain = [
        match.end()
        for match in _STOP.finditer(text, start, end)
        if text[match.start()] != "." or not _is_no_end(text, match.start(), match.end(), start)
    ]
    certain += [match.end() for match in _CONNECTIVE.finditer(text, start, end)]
    if text.find(";", start, end) >= 0:
        certain += [match.end() for match in _SEMICOLON.finditer(text, start, end)]
    if not text.isascii():
        certain += [match.end() for match in _WIDE.finditer(text, start, end)]
    if text.find("=", start, end) >= 0:
        certain += [m.end() for m in _CALCULATION.finditer(text, start, end) if _is_result(m["result"], m["unit"])]
    capitals = {match.start(): match.group() for match in _CAPITAL.finditer(text, start, end)}
    for cut in certain:
        capitals.pop(cut, None)
    cuts: list[int] = []
    scanned = start
    calculated = False  # an "=" was found since the last cut
    for cut in sorted({*certain, *capitals}):
        word = capitals.get(cut)
        if word is not None:
            calculated = calculated or text.find("=", scanned, cut) >= 0
            scanned = cut
            if not _opens_sentence(text, cut, word, calculated):
                continue
        if start < cut < end:
            cuts.append(cut)
        scanned, calculated = cut, False
    return cuts


def _is_no_end(text: str, stop: int, cut: int, start: int) -> bool:
    """Return True if the period at ``stop`` belongs to an abbreviation, an initial or an opening enumerator."""
    tail = text[stop - 5 : stop]
    if tail.isalpha() and tail != "pprox":
        return False  # the common case: no other abbreviation is as long
    words = text[max(start, stop - 2 * _LONGEST_ABBREVIATION) : stop].split()
    if not words or len(words[-1]) > _LONGEST_ABBREVIATION:
        return False
    word = words[-1]
    if _ABBREVIATION.search(word):
        return True
    if _INITIAL.search(word):
        # "J. Smith", but "... from A to B. The train ..."
        following = text[cut : cut + 16].split(None, 1)[0].rstrip(",")
        return following not in _OPENERS and following not in _WEAK_OPENERS
    if _BARE_ENUMERATOR.fullmatch(word) is None:
        return False
    numbered = len(words) > 1 and words[-2][-1] == "." and _ABBREVIATION.search(words[-2][:-1]) is not None
    return word[0] == "(" or (not numbered and opens_item(text, stop - len(word)))  # "Fig. 3." is not an item


def opens_item(text: str, start: int) -> bool:
    """Return True if an item can begin at ``start``: on a new line or after punctuation."""
    before = text[max(0, start - 20) : start].rstrip(" \t")
    return before == "" or before[-1] in "\n:;.!?。；：，"


def _is_result(value: str, unit: str) -> bool:
    return any(map(str.isdigit, value)) and unit.rpartition(" ")[2] not in _NEVER_LAST


def _opens_sentence(text: str, cut: int, word: str, calculated: bool) -> bool:
    """Return True if the capitalised ``word`` at ``cut`` begins a sentence although no punctuation precedes it.

    ``calculated`` is True if the sentence before it holds an ``=``.
    """
    if not calculated and word not in _OPENERS:
        return False
    words = text[max(0, cut - 16) : cut].split()
    before = words[-1].lstrip("\"'“‘(*_$") if words else ""
    if not before or before[-1] in ".!?…:;,=+/-" or before.lower() in _NEVER_LAST or _BARE_ITEM.fullmatch(before):
        return False
    if calculated and (word in _OPENERS or word in _WEAK_OPENERS):
        return True
    if not calculated:
        # Not the title "So Long", nor "Now" in "Only Now and Then".
        return _LOWER_NEXT.match(text, cut) is not None
    verb = _NAME_THEN_VERB.match(text, cut)
    names_unit = before[0].isupper() or _ENDS_IN_NUMBER.search(before) is not None
    return verb is not None and not (names_unit and verb["next"] in _JOINING)
