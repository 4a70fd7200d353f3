"""The embedded model: a tiny reasoner that is right about a third of the time.

`weights/` is an ordinary Hugging Face folder (a Qwen3 of 0.42 million parameters), so everything
that takes a model takes `path()`. `problems` generates the questions that it was warmed up on and,
apart from them by construction, held-out ones. Importing this package costs no torch.
"""

from pathlib import Path


def path() -> Path:
    """Return the folder to hand to `from_pretrained`: config, weights, tokenizer and chat template."""
    return Path(__file__).parent / "weights"
