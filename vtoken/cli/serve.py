"""`python -m vtoken serve-check`: an engine with the plugin against the counts of the library, and without pruning."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from vtoken.cli.settings import key_values
from vtoken.core.config import make_config
from vtoken.methods.controls import UniformTokens

if TYPE_CHECKING:
    from vtoken.serving.trial import Trial


def run(args: argparse.Namespace) -> int:
    """Run both engines, one after the other, and print what they did; 1 if a count is not the library's."""
    settings = make_config(args.method[0], key_values(args.method[1:]))
    image = args.image if args.image is not None else tuple(args.size)
    engine = key_values(args.engine)
    from vtoken.serving.trial import trial  # and with it transformers: wrong words are told before

    common = {"requests": args.requests, "new": args.new, "limit": args.limit, "options": engine}
    short = trial(args.folder, settings, image, **common)
    whole = trial(args.folder, UniformTokens(keep_ratio=1.0, newline="all"), image, **common)
    wrong = [found for found in (whole, short) if found.image_tokens != found.expected]
    if args.json:
        print(json.dumps({"method": settings.to_dict(), "whole": asdict(whole), "short": asdict(short)}))
    else:
        print(f"{args.folder}, {settings}, vLLM {short.vllm}, {args.requests} requests, {args.new} new tokens each")
        print(table(whole, short))
    for found in wrong:
        print(f"the engine keeps {found.image_tokens} image tokens, vtoken.num_tokens says {found.expected}")
    return int(bool(wrong))


def table(whole: Trial, short: Trial) -> str:
    """Both side by side."""
    rows = [("", "whole", "shortened")]
    rows += [
        (name, f"{getattr(whole, field):{form}}", f"{getattr(short, field):{form}}")
        for name, field, form in (
            ("image tokens in the engine", "image_tokens", "d"),
            ("image tokens by vtoken.num_tokens", "expected", "d"),
            ("tokens of a prompt", "prompt_tokens", "d"),
            ("KV cache of a prompt, bytes", "cache_bytes", "d"),
            ("generated tokens a second", "tokens_per_second", ".1f"),
            ("requests a second", "requests_per_second", ".2f"),
        )
    ]
    return "\n".join(f"{name:<36}{one:>14}{other:>14}" for name, one, other in rows)
