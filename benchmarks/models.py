"""Models by name, with random weights or none: timm names, `open_clip:NAME`, `hf:CONFIG` (nothing is downloaded)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.core.host import find_adapter
from vtoken.errors import ConfigError
from vtoken.hosts.names import check_name

NAMES = "timm name, open_clip:NAME (ViT-B-32), or hf:CONFIG (CLIPVisionConfig, or a folder with a config.json)"


def build(name: str, device: torch.device | str = "meta", *, img_size: int | None = None) -> Any:
    """The model called `name` in eval mode, without gradients; on the meta device it has no weights at all.

    Args:
        name: see NAMES.
        device: where its random weights are made.
        img_size: side of the input in pixels, for timm models; None means the model's own.

    Raises:
        ConfigError: for unknown names. UnsupportedModelError: if vtoken does not know the model.
    """
    family, sign, rest = name.partition(":")
    makers = {"open_clip": _open_clip, "hf": _hugging_face}
    if sign and family not in makers:
        raise ConfigError(f"model {name!r}: expected a {NAMES}")
    if sign and img_size is not None:
        raise ConfigError(f"model {name!r}: --img-size is for timm models; name a model built for that size")
    model = makers[family](rest, device) if sign else _timm(name, device, img_size)
    find_adapter(model).spec(model)
    return model.eval().requires_grad_(False)


def input_size(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the model's images."""
    adapter = find_adapter(model)
    return adapter.channels(model), *adapter.image_size(model)


def random_images(model: Any, batch: int, like: Tensor) -> Tensor:
    """Noise [B, C, H, W] with device and dtype of `like`; what pixels show does not change these times."""
    return torch.randn(batch, *input_size(model), device=like.device).to(like.dtype)


def _timm(name: str, device: torch.device | str, img_size: int | None) -> nn.Module:
    import timm

    check_name(name)
    options = {} if img_size is None else {"img_size": img_size}
    with torch.device(device):
        model: nn.Module = timm.create_model(name, **options)
    return model


def _open_clip(name: str, device: torch.device | str) -> nn.Module:
    import open_clip

    if open_clip.get_model_config(name) is None:
        raise ConfigError(f"open_clip has no architecture {name!r}; see open_clip.list_models()")
    logging.getLogger().addFilter(_expected)
    try:
        with torch.device(device):
            model: nn.Module = open_clip.create_model(name, device=device)
    finally:
        logging.getLogger().removeFilter(_expected)
    return model


def _expected(record: logging.LogRecord) -> bool:
    # Random weights are what is wanted here.
    return "No pretrained weights" not in record.getMessage()


def _hugging_face(name: str, device: torch.device | str) -> nn.Module:
    import transformers

    if Path(name).is_dir():
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    elif isinstance(getattr(transformers, name, None), type):
        config = getattr(transformers, name)()
    else:
        raise ConfigError(f"hf:{name}: neither a folder nor a configuration class of transformers (CLIPVisionConfig)")
    with torch.device(device):
        model: nn.Module = transformers.AutoModel.from_config(config)
    return model
