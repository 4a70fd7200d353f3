"""Step-wise reinforcement learning of language models with sparse, masked updates.

What other programs build on is named here. Each name is imported when it is first asked for (PEP 562), so that
``import ssrctl``, and with it the command line, costs no torch::

    from ssrctl import BlockMask, KronosOpt, segment, select_topk, two_level_advantages
"""

import importlib
from typing import TYPE_CHECKING, Any

from ssrctl.version import __version__

__all__ = ["BlockMask", "KronosOpt", "__version__", "segment", "select_topk", "two_level_advantages"]

# Which module defines each public name.
_HOMES = {
    "BlockMask": "ssrctl.core.mask",
    "KronosOpt": "ssrctl.core.kronos",
    "segment": "ssrctl.text.segment",
    "select_topk": "ssrctl.core.topk",
    "two_level_advantages": "ssrctl.core.advantages",
}

if TYPE_CHECKING:
    from ssrctl.core.advantages import two_level_advantages
    from ssrctl.core.kronos import KronosOpt
    from ssrctl.core.mask import BlockMask
    from ssrctl.core.topk import select_topk
    from ssrctl.text.segment import segment
else:  # a type checker that saw this would accept every misspelt name

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'ssrctl' has no attribute {name!r}; its public names: {', '.join(__all__)}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value  # the next look-up does not come here
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
