"""Hook of mkdocs: links from a page to files outside of docs/ become the file's name, or a link into the repository."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Rewrite links that lead out of docs/; the site has no pages for them."""
    address = (config.get("repo_url") or "").rstrip("/")

    def rewrite(found: re.Match[str]) -> str:
        text, path = found.groups()
        if address:
            return f"[{text}]({address}/blob/main/{path})"
        return text if path in text else f"{text} (`{path}`)"

    return OUTSIDE.sub(rewrite, markdown)
