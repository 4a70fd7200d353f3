"""`ssrctl recipes`: the settings of the papers' runs, as yaml files for `ssrctl train --recipe` and `ssrctl eval --recipe`."""

from __future__ import annotations

import sys
from typing import Any

from ssrctl.configs import RecipesConfig
from ssrctl.io.package_data import profile_path, shipped_names


def run(config: RecipesConfig) -> dict[str, Any]:
    """Print the names and titles of all recipes, or one recipe, on stdout (unless ``--json``) and return them.

    Raises:
        UserError: no such recipe.
    """
    if config.name is not None:
        text = profile_path("recipes", config.name, ".yaml").read_text(encoding="utf-8")
        if not config.json:
            sys.stdout.write(text)
        return {config.name: text}
    titles = {name: _title(name) for name in shipped_names("recipes", ".yaml")}
    if not config.json:
        width = max(map(len, titles))
        sys.stdout.write("".join(f"{name:{width}}  {title}\n" for name, title in titles.items()))
    return titles


def _title(name: str) -> str:
    """Return the first line of a recipe, without its mark."""
    text = profile_path("recipes", name, ".yaml").read_text(encoding="utf-8")
    return text.partition("\n")[0].removeprefix("# ")
