"""Images for the command line: of a folder per class, or random."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from vtoken.errors import ConfigError


def load_images(args: argparse.Namespace, model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Images of --data, or random ones without it, as the timm model takes them, and labels if they have any.

    Returns:
        [N, C, H, W] and [N], on --device.
    """
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    options = {"img_size": args.img_size} if args.img_size else {}
    config = resolve_data_config(options, model=model)
    if args.data is None:
        try:
            return torch.randn(args.batch, *config["input_size"], device=args.device), None
        except RuntimeError as error:  # memory
            raise ConfigError(f"--batch {args.batch}: so many images cannot be made: {error}") from error
    from torchvision.datasets import ImageFolder

    if not args.data.is_dir():
        raise ConfigError(f"--data {args.data}: no such folder; it must hold one folder of images per class")
    try:
        folder = ImageFolder(str(args.data), transform=create_transform(**config, is_training=False))
    except FileNotFoundError as error:  # no class, or a class without an image
        told = str(error).partition("\n")[0]
        raise ConfigError(f"--data {args.data} must hold one folder of images per class: {told}") from error
    step = max(1, len(folder) // args.limit)
    chosen = [folder[i] for i in range(0, len(folder), step)][: args.limit]
    images = torch.stack([image for image, _ in chosen])
    return images.to(args.device), torch.tensor([label for _, label in chosen], device=args.device)
