"""Models by name for the command line: random, pretrained or from a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vtoken.core.host import host_of
from vtoken.errors import ConfigError
from vtoken.hosts.names import build


def build_model(args: argparse.Namespace) -> nn.Module:
    """The timm model that the options name, in eval mode; refused before anything is measured or drawn."""
    model: Any = build(args.model, pretrained=args.pretrained, img_size=args.img_size, num_classes=args.num_classes)
    host_of(model)
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
    try:
        loaded = _read(path)
    except (*_DAMAGED, OSError) as error:
        told = str(error).strip().partition("\n")[0]  # torch adds paragraphs of advice
        raise ConfigError(f"--checkpoint {path} cannot be read as weights: {told}") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ConfigError(f"--checkpoint {path} holds {type(loaded).__name__}, not a dict of named tensors")
    return {str(name).removeprefix("module."): value for name, value in loaded.items()}


#: What safetensors and torch raise for a file that is none of theirs, or that is cut off.
_DAMAGED = (SafetensorError, UnpicklingError, RuntimeError, ValueError, KeyError, EOFError)


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def describe_weights(args: argparse.Namespace) -> str:
    """Where the weights come from, for a table or a picture."""
    return "pretrained" if args.pretrained else str(args.checkpoint or "random weights")
