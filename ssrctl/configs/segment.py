"""Settings of segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ssrctl.configs.building import AtLeastOne, Config, ZeroOrMore, output, positional
from ssrctl.configs.common import CommonConfig, InputFormat, RecordFormat
from ssrctl.errors import UserError


@dataclass(kw_only=True)
class SegmentOptions(Config):
    """Settings of the split of a response into steps."""

    panel = "Segmentation"

    segment_style: Literal["auto", "newline", "paragraph"] = "auto"
    """auto: line breaks, enumerations and headings, else sentence ends and discourse markers; newline: every
    line outside of code, formulas and tables; paragraph: blank lines only."""

    max_segments: AtLeastOne = 64
    """Largest number of steps per response; beyond it the shortest neighbours are merged."""

    min_segment_chars: AtLeastOne = 2
    """A step shorter than this many characters is merged into its neighbour."""

    max_segment_chars: ZeroOrMore = 2000
    """A step longer than this many characters is cut at line and sentence ends where it has any; 0 is off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.max_segment_chars < 40:
            raise UserError(f"--max-segment-chars must be 0 or at least 40, got {self.max_segment_chars}")

    @property
    def segment_arguments(self) -> dict[str, Any]:
        """The settings as keyword arguments of ``ssrctl.text.segment.segment``."""
        return {
            "style": self.segment_style,
            "max_steps": self.max_segments,
            "min_chars": self.min_segment_chars,
            "max_chars": self.max_segment_chars,
        }


@dataclass(kw_only=True)
class SegmentConfig(SegmentOptions, CommonConfig):
    """Split responses into reasoning steps.

    Example: ssrctl segment responses.jsonl -o steps.jsonl
    """

    input: str = positional(metavar="RESPONSES")
    """Responses (jsonl), or - for stdin."""

    output: str = output("-")
    """File for the responses with their steps (jsonl), or - for stdout."""

    format: InputFormat = "auto"
    """Format of the responses (docs/formats.md); auto tells it by the fields. Labelled solutions keep their steps, as the
    labels count them."""

    output_format: RecordFormat = "ssrctl"
    """Format of the output. Those of labelled solutions take the labels of the input; responses without are left out."""

    tokenizer: str | None = None
    """Also count the tokens of each step, by this model's tokenizer (hub name or local folder)."""
