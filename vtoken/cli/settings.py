"""Settings given on the command line as KEY=VALUE."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vtoken.core.errors import ConfigError


def key_values(items: Sequence[str]) -> dict[str, Any]:
    """["margin=0.75", "metric=hidden"] as a dict; values are read as JSON, else as a bare word.

    Raises:
        ConfigError: for an item without "=".
    """
    settings: dict[str, Any] = {}
    for item in items:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise ConfigError(f"{item!r}: write KEY=VALUE (VALUE as JSON or a bare word), for instance margin=0.75")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings
