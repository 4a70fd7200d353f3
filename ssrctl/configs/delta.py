"""Settings of the delta commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ssrctl.configs.building import output, positional
from ssrctl.configs.common import HubOptions, JsonConfig, PairOptions


@dataclass(kw_only=True)
class DeltaDiffConfig(PairOptions, HubOptions):
    """Write the difference of a base and a tuned checkpoint as a delta: the coordinates that differ bit for bit.

    Checkpoints are model folders (one file or shards) or safetensors files. Where the dtypes differ, the tuned
    one's counts, provided that the base's values have an exact form in it. Tensors that only one side has are left out.

    Example: ssrctl delta diff base tuned -o delta.safetensors
    """

    base: Path = positional(metavar="BASE")
    """The checkpoint that the delta will apply to: a model folder, a safetensors file, a name on the hub, or
    tiny-reasoner."""

    tuned: Path = positional(metavar="TUNED")
    """The checkpoint that applying it will give again: a model folder, a safetensors file or a name on the hub."""

    output: Path = output()
    """Delta to write (safetensors)."""

    format: Literal["small", "plain"] = "small"
    """small: packed gaps and steps from the base's values, which applying needs (a fifth of the size); plain: flat indices
    and values, as patches of inference engines take them."""


@dataclass(kw_only=True)
class DeltaApplyConfig(HubOptions):
    """Put a delta into its base and write the result as a model folder, with config and tokenizer.

    The folder has the base's layout, one file or the same shards. Values are written bit for bit, in the delta's
    dtype: a run in float32 on a bfloat16 base gives a float32 folder, and its config.json says so.

    Example: ssrctl delta apply base runs/first -o tuned
    """

    base: Path = positional(metavar="BASE")
    """The checkpoint that the delta was made from: a model folder, a safetensors file, a name on the hub, or
    tiny-reasoner."""

    delta: Path = positional(metavar="DELTA")
    """A delta file, a checkpoint folder, a run directory (its newest checkpoint), or a name on the hub."""

    output: Path = output()
    """Model folder to write; must not exist, or be empty."""

    ignore_fingerprint: bool = False
    """Apply a delta that was made from other weights of the same shapes."""


@dataclass(kw_only=True)
class DeltaInfoConfig(JsonConfig):
    """Show a delta: its base, its size, and the number of entries of each tensor and layer.

    Example: ssrctl delta info delta.safetensors
    """

    delta: Path = positional(metavar="DELTA")
    """A delta file, a checkpoint folder, a run directory (its newest checkpoint), or a name on the hub."""
