"""Methods, amounts and other settings given on the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from vtoken.cli.values import share, whole
from vtoken.core.config import MethodConfig, make_config
from vtoken.errors import ConfigError


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
        except (ValueError, RecursionError):  # no JSON, or a number or a nest that Python does not read
            settings[key] = value
    return settings


def add_sweep(parser: argparse.ArgumentParser, methods: Sequence[str], ratios: Sequence[float]) -> None:
    """The options that choose methods and amounts, with their defaults; `sweep` reads them."""
    parser.add_argument("--method", nargs="+", default=list(methods), help="see `methods` of the command line")
    amount = parser.add_mutually_exclusive_group()
    shown = " ".join(f"{ratio:g}" for ratio in ratios)
    amount.add_argument(
        "--ratio", type=share, nargs="+", default=list(ratios), help=f"share of tokens kept per layer (default {shown})"
    )
    amount.add_argument("--r", type=whole(0), nargs="+", help="instead: tokens removed per layer")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="another setting of the methods")


def sweep(args: argparse.Namespace) -> list[MethodConfig]:
    """Every chosen method with every chosen amount; a method that knows neither ratio nor r once.

    Raises:
        ConfigError: for unknown methods or settings.
    """
    settings = key_values(args.set)
    if settings.keys() & {"ratio", "r"}:
        raise ConfigError("--set cannot change ratio or r; use --ratio or --r")
    amounts: list[dict[str, Any]] = [{"r": r} for r in args.r] if args.r else [{"ratio": r} for r in args.ratio]
    found: list[MethodConfig] = []
    for method in args.method:
        config = make_config(method, settings)
        takes = {f.name for f in fields(config)} & {"ratio", "r"}
        found += [make_config(method, amount | settings) for amount in amounts] if takes else [config]
    return found
