"""Models by name for the command line: random, pretrained or from a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.core.errors import ConfigError
from vtoken.core.host import find_adapter
from vtoken.hosts.names import check_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose size, head and weights."""
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="timm's pretrained weights (needs a hub)")
    weights.add_argument("--checkpoint", type=Path, help="weights from a .safetensors or .pth file")
    parser.add_argument("--img-size", type=int, help="side of the input in pixels")
    parser.add_argument("--num-classes", type=int, help="classes of the head, if not the model's own")


def build_model(args: argparse.Namespace) -> nn.Module:
    """The timm model that the options name, in eval mode; refused before anything is measured or drawn."""
    import timm

    check_name(args.model)
    options = {"img_size": args.img_size, "num_classes": args.num_classes}
    given = {name: value for name, value in options.items() if value is not None}
    model: Any = timm.create_model(args.model, pretrained=args.pretrained, **given)
    find_adapter(model).spec(model)
    if args.checkpoint:
        try:
            model.load_state_dict(load_weights(args.checkpoint))
        except RuntimeError as error:
            raise ConfigError(f"--checkpoint {args.checkpoint} does not fit {args.model}: {error}") from error
    return model.eval().requires_grad_(False)


def load_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a torch file read with weights_only=True; opens "state_dict"."""
    if not path.is_file():
        raise ConfigError(f"--checkpoint {path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    return {name.removeprefix("module."): value for name, value in loaded.items()}


def describe_weights(args: argparse.Namespace) -> str:
    """Where the weights come from, for a table or a picture."""
    return "pretrained" if args.pretrained else str(args.checkpoint or "random weights")
