"""`python -m vtoken overlay` of a tower: one image beside its merged groups, or beside its kept and pruned patches."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtoken.cli import prompt_overlay, weights
from vtoken.cli.parser import SALIENCY
from vtoken.cli.pictures import read_image
from vtoken.cli.settings import key_values
from vtoken.core.apply import applied
from vtoken.core.config import make_config
from vtoken.core.host import host_of
from vtoken.core.trace import trace
from vtoken.demo.saliency import MEAN, NATIVE_SIZE, STD, load_saliency_vit
from vtoken.errors import ConfigError


def run(args: argparse.Namespace) -> int:
    """Run the image through the model and write the picture."""
    from vtoken.visualize import draw_groups, draw_kept

    torch.manual_seed(0)
    config = make_config(args.method, key_values(args.settings))
    if Path(args.model).is_dir():
        return prompt_overlay.run(args, config)
    model, source, size, mean, std = _model(args)
    image = read_image(args.image, size)
    channels = (1, -1, 1, 1)
    inputs = (image[None] - torch.tensor(mean).view(channels)) / torch.tensor(std).view(channels)
    depth = host_of(model).spec.depth
    layer = depth - 1 if args.layer is None else args.layer
    if not 0 <= layer < depth:
        raise ConfigError(f"--layer {layer}: {args.model} has blocks 0 to {depth - 1}")
    with applied(model, config), torch.inference_mode():
        _, record = trace(model, inputs)
    scale = prompt_overlay.scale_of(image)
    kept, prunes = record.kept(layer=layer), getattr(config, "reduction", None) == "prune"
    if prunes:
        assert record.grid is not None
        picture = draw_kept(image, kept, record.grid, scale=scale)
    else:
        picture = draw_groups(image, record, layer=layer, scale=scale)
    patches, what = record.layer_dest[layer].shape[1] - record.num_prefix, "kept" if prunes else "groups"
    told = f"{args.method}, block {layer}: {patches} patches, {kept.shape[0]} {what}"
    prompt_overlay.save(args.out, image, picture, f"{args.model}, {Path(source).name}", told)
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
