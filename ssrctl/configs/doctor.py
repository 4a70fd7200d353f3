"""Settings of `ssrctl doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from ssrctl.configs.common import JsonConfig


@dataclass(kw_only=True)
class DoctorConfig(JsonConfig):
    """Check this installation, and print versions and devices to paste into a bug report.

    Each check is ok, warn or fail, with a remedy. A failed check gives exit code 4. Nothing is downloaded.

    Example: ssrctl doctor
    """
