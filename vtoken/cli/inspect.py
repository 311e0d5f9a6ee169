"""The small commands: info, methods, models, plan, report."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from dataclasses import asdict, fields
from typing import Any

import torch

from vtoken.accounting.report import report
from vtoken.cli.settings import key_values
from vtoken.core.config import MethodConfig, applicable, example, make_config
from vtoken.core.counts import plan
from vtoken.hosts.names import build_weightless, supported, why_not
from vtoken.ops import explain


def _kernels_on(device: str) -> str:
    return str(explain("plan_tome", torch.empty(1, 1, 1, device=device)))


def show_info(args: argparse.Namespace) -> int:
    """Versions and devices."""
    names = ("vtoken", "torch", "timm", "open_clip_torch", "transformers", "triton", "av")
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    cuda = torch.cuda.is_available()
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if cuda else 0))]
    found["devices"] = ["cpu", *(torch.cuda.get_device_name(d) for d in devices[1:])]
    found["kernels"] = {d: _kernels_on(d) for d in devices}
    print(json.dumps(found) if args.json else "\n".join(f"{k:<16} {v or 'not installed'}" for k, v in found.items()))
    return 0


def show_methods(args: argparse.Namespace) -> int:
    """Every method that the commands take, with its settings and their defaults."""
    found = {name: example(name).to_dict() for name in applicable()}
    if args.json:
        print(json.dumps(found))
        return 0
    for name in applicable():
        config = example(name)
        line = ", ".join(f"{f.name}={getattr(config, f.name)!r}" for f in fields(config))
        print(f"{name}: {type(config).__name__}({line})")
    return 0


def show_models(args: argparse.Namespace) -> int:
    """Supported timm names; with --why, the refused ones among the pattern and their reasons."""
    if args.why:
        import timm

        refused = {name: reason for name in timm.list_models(args.pattern) if (reason := why_not(name)) is not None}
        print(json.dumps(refused) if args.json else "\n".join(f"{name}: {reason}" for name, reason in refused.items()))
        return 0 if refused else 1
    names = supported(args.pattern)
    print(json.dumps(names) if args.json else "\n".join(names))
    return 0 if names else 1


def show_plan(args: argparse.Namespace) -> int:
    """Token counts per layer."""
    found = plan(build_weightless(args.model, img_size=args.img_size), _config(args))
    print(json.dumps(asdict(found)) if args.json else found)
    return 0


def show_report(args: argparse.Namespace) -> int:
    """Cost before and after."""
    found = report(build_weightless(args.model, img_size=args.img_size), _config(args))
    print(json.dumps(found.to_dict()) if args.json else found)
    return 0


def _config(args: argparse.Namespace) -> MethodConfig:
    return make_config(args.method, key_values(args.settings))
