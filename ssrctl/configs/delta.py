"""Settings of the delta commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssrctl.configs.building import output, positional
from ssrctl.configs.common import CommonConfig


@dataclass(kw_only=True)
class DeltaDiffConfig(CommonConfig):
    """Write what turns a base into a tuned checkpoint as a delta: the coordinates that differ bit for bit.

    Checkpoints are model folders (one file or shards) or safetensors files. Where the dtypes differ, the tuned
    one's counts, provided that the base's values have an exact form in it.
    """

    base: Path = positional(metavar="BASE")
    """The checkpoint that the delta will apply to: a model folder, a safetensors file, or tiny-reasoner."""

    tuned: Path = positional(metavar="TUNED")
    """The checkpoint that applying it will give again: a model folder or a safetensors file."""

    output: Path = output()
    """Delta to write (safetensors)."""


@dataclass(kw_only=True)
class DeltaApplyConfig(CommonConfig):
    """Put a delta into its base and write the result as a model folder, with config and tokenizer.

    The folder has the base's layout, one file or the same shards. Values are written bit for bit, in the delta's
    dtype: a run in float32 on a bfloat16 base gives a float32 folder, and its config.json says so.
    """

    base: Path = positional(metavar="BASE")
    """What the delta was made from: a model folder, a safetensors file, or tiny-reasoner."""

    delta: Path = positional(metavar="DELTA")
    """A delta file, a checkpoint folder, or a run directory, of which the newest checkpoint is taken."""

    output: Path = output()
    """Model folder to write; must not exist, or be empty."""

    ignore_fingerprint: bool = False
    """Apply a delta that was made from other weights of the same shapes."""


@dataclass(kw_only=True)
class DeltaInfoConfig:
    """Show what a delta holds: its base, its size, and how many entries each tensor and layer has."""

    delta: Path = positional(metavar="DELTA")
    """A delta file, a checkpoint folder, or a run directory, of which the newest checkpoint is taken."""

    json: bool = False
    """Print the result as one json object on stdout."""
