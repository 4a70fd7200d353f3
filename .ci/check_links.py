"""Check that relative links and anchors in all markdown files lead somewhere.

    python .ci/check_links.py [FOLDER]

Checked are links, images and html ``href``/``src`` in every ``*.md`` file of the repository, outside of code. Addresses
with a scheme (``https:``) are not followed, so that the check needs no network. Exits with 1 if a link is broken.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from urllib.parse import unquote

FENCE = re.compile(r"^([ \t]*)(```+|~~~+).*?^\1\2[ \t]*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(
    r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^\]]+\]:\s*(\S+)|(?:href|src)=\"([^\"]+)\"", re.MULTILINE
)
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)


def markdown_files(root: Path) -> list[Path]:
    """List the markdown files that git tracks or would track."""
    call = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    names = subprocess.run(call, capture_output=True, text=True, check=True).stdout.splitlines()
    return [root / name for name in sorted(set(names)) if (root / name).is_file()]


def links(text: str) -> list[str]:
    """List the targets of all links outside of code."""
    text = CODE.sub("", FENCE.sub("", text))
    return [next(filter(None, found)) for found in LINK.findall(text)]


@cache
def anchors(path: Path) -> frozenset[str]:
    """Return the anchors of a markdown file's headings, as GitHub makes them."""
    made: Counter[str] = Counter()
    found = set()
    for title in HEADING.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{made[slug]}" if made[slug] else slug)
        made[slug] += 1
    return frozenset(found)


def problem(source: Path, link: str, root: Path) -> str | None:
    """Return the reason why a link is broken, or None."""
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", link):
        return None
    name, _, anchor = unquote(link).partition("#")
    target = (source.parent / name).resolve() if name else source
    if not target.exists():
        return "no such file"
    if not target.is_relative_to(root):
        return "outside of the repository"
    if anchor and target.suffix == ".md" and anchor not in anchors(target):
        return "no such heading"
    return None


def main(root: Path) -> int:
    files = markdown_files(root)
    broken = [
        f"{path.relative_to(root)}: {link}: {reason}"
        for path in files
        for link in links(path.read_text(encoding="utf-8"))
        if (reason := problem(path, link, root))
    ]
    print(*broken, sep="\n", file=sys.stderr, end="\n" if broken else "")
    print(f"{len(files)} markdown files, {len(broken)} broken links")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()))
