"""`python -m vtoken overlay`: one image beside its merged groups, or beside its kept and pruned patches."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vtoken.cli import weights
from vtoken.cli.parser import SALIENCY
from vtoken.cli.settings import key_values
from vtoken.core.apply import applied
from vtoken.core.config import make_config
from vtoken.core.host import host_of
from vtoken.core.trace import trace
from vtoken.demo.photos import load_photographs, photograph_names
from vtoken.demo.saliency import MEAN, NATIVE_SIZE, STD, load_saliency_vit
from vtoken.errors import ConfigError

_WIDTH = 448  # pixels that a picture should have at least


def run(args: argparse.Namespace) -> int:
    """Run the image through the model and write the picture."""
    from vtoken.visualize import draw_groups, draw_image, draw_kept, side_by_side

    torch.manual_seed(0)
    config = make_config(args.method, key_values(args.settings))
    model, source, size, mean, std = _model(args)
    image = _read_image(args.image, size)
    channels = (1, -1, 1, 1)
    inputs = (image[None] - torch.tensor(mean).view(channels)) / torch.tensor(std).view(channels)
    depth = host_of(model).spec.depth
    layer = depth - 1 if args.layer is None else args.layer
    if not 0 <= layer < depth:
        raise ConfigError(f"--layer {layer}: {args.model} has blocks 0 to {depth - 1}")
    with applied(model, config), torch.inference_mode():
        _, record = trace(model, inputs)
    scale = max(1, -(-_WIDTH // image.shape[2]))
    kept, prunes = record.kept(layer=layer), getattr(config, "reduction", None) == "prune"
    if prunes:
        assert record.grid is not None
        picture = draw_kept(image, kept, record.grid, scale=scale)
    else:
        picture = draw_groups(image, record, layer=layer, scale=scale)
    patches, what = record.layer_dest[layer].shape[1] - record.num_prefix, "kept" if prunes else "groups"
    told = f"{args.method}, block {layer}: {patches} patches, {kept.shape[0]} {what}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    side_by_side([draw_image(image, scale=scale), picture], [f"{args.model}, {Path(source).name}", told]).save(args.out)
    note = "; they say little about what trained ones would do" if source == "random weights" else ""
    print(f"{told}\n{args.model}: {source}{note}\nwrote {args.out}")
    return 0


def _model(args: argparse.Namespace) -> tuple[nn.Module, str, tuple[int, int], Any, Any]:
    """The model, where its weights come from, and its input: (height, width), mean and deviation."""
    if args.model == SALIENCY:
        if args.pretrained or args.checkpoint or args.num_classes is not None:
            raise ConfigError(f"{SALIENCY} has weights of its own and no head; leave out the options for them")
        side = args.img_size or NATIVE_SIZE
        return load_saliency_vit(side).backbone, "pretrained", (side, side), MEAN, STD
    model = weights.build_model(args)
    from timm.data.config import resolve_data_config

    data = resolve_data_config({"img_size": args.img_size} if args.img_size else {}, model=model)
    if data["input_size"][0] != 3:
        raise ConfigError(f"{args.model} takes images of {data['input_size'][0]} channel(s); a picture has 3")
    return model, weights.describe_weights(args), data["input_size"][1:], data["mean"], data["std"]


def _read_image(file: Path, size: tuple[int, int]) -> Tensor:
    """The largest centred part of the image that has the model's shape, [3, H, W] in [0, 1]."""
    height, width = size
    name = str(file)
    if not file.exists() and name in photograph_names() and height == width:
        return load_photographs(height, [name])[1][0]
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError('pictures need pillow; install "vtoken[viz]"') from error
    try:
        with Image.open(file) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError as error:
        raise ConfigError(f"{name}: no such file, nor one of the photographs {photograph_names()}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{name} cannot be read as an image: {error}") from error
    fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return rearrange(pixels, "h w c -> c h w").float() / 255
