"""`python -m vtoken overlay` of a multimodal model: one image beside the tokens of it that reach the language model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtoken.cli.pictures import as_tensor, open_image
from vtoken.core.apply import applied
from vtoken.core.config import MethodConfig
from vtoken.core.trace import Trace, trace
from vtoken.errors import ConfigError

_WIDTH = 448  # pixels that a picture should have at least


def run(args: argparse.Namespace, config: MethodConfig) -> int:
    """Ask the model of a folder about the image and draw which tokens the method kept for the answer."""
    from vtoken.visualize import draw_kept

    if args.pretrained or args.checkpoint or args.img_size or args.num_classes is not None or args.layer is not None:
        raise ConfigError(f"{args.model} is a folder with a model of transformers: it has weights and a size of its "
                          "own, so leave out the options for timm's; --question is for it")  # fmt: skip
    if config.part != "prompt":
        raise ConfigError(f"{config.method} acts inside a tower, not in the prompt of a multimodal model: of a folder, "
                          "methods of prompts are drawn, such as vtc_cls or divprune")  # fmt: skip
    model, processor = _loaded(args.model)
    picture = open_image(args.image)
    given = processor(images=[picture], text=[_prompt(processor, args.question)], return_tensors="pt")
    with applied(model, config), torch.inference_mode():
        _, record = trace(model, **given)
    if record.prompt is None or record.grid is None:  # every token stays
        raise ConfigError(f"{config.method} left the prompt of {type(model).__name__} as it was: there is nothing to "
                          "draw. Ask for fewer tokens")  # fmt: skip
    image, kept = _seen(processor, given, record, picture), record.kept()
    prompt = record.prompt
    shown = "" if prompt.full_lengths[0] == record.grid[0] * record.grid[1] else f", {kept.shape[0]} in this picture"
    told = f"{args.method}: {prompt.lengths[0]} of {prompt.full_lengths[0]} tokens{shown}"
    scale = scale_of(image)
    save(args.out, image, draw_kept(image, kept, record.grid, scale=scale), Path(args.model).name, told)
    print(f"{told}\n{args.model}: {type(model).__name__}\nwrote {args.out}")
    return 0


def scale_of(image: Tensor) -> int:
    """By how much an image [3, H, W] is enlarged."""
    return max(1, -(-_WIDTH // image.shape[2]))


def save(file: Path, image: Tensor, beside: Any, title: str, told: str) -> None:
    """Write the image [3, H, W] and a picture beside it, with a line over each."""
    from vtoken.visualize import draw_image, side_by_side

    file.parent.mkdir(parents=True, exist_ok=True)
    side_by_side([draw_image(image, scale=scale_of(image)), beside], [title, told]).save(file)


def _loaded(folder: str) -> tuple[Any, Any]:
    """The model and the processor of a folder; nothing is fetched, and no code of the folder runs."""
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise ImportError('multimodal models need transformers; install "vtoken[hf]"') from error
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True).eval()
        return model, AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        told = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{folder} holds no image-text model with its processor that transformers can load: {told}"
                          ) from error  # fmt: skip


def _prompt(processor: Any, question: str) -> str:
    """A question behind an image, in the model's own form of a dialogue if it has one."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return text
    return f"{processor.image_token} {question}"


def _seen(processor: Any, given: Any, record: Trace, picture: Any) -> Tensor:
    """What the model was shown under the grid of the record, [3, H, W] in [0, 1]: its crop, its tile, or all of it."""
    assert record.prompt is not None
    assert record.grid is not None
    pixels, maker = given["pixel_values"], processor.image_processor
    if pixels.dim() < 4:  # patches of the whole image in a row
        side = int(maker.patch_size) * int(getattr(maker, "merge_size", 1))
        return as_tensor(picture.resize((record.grid[1] * side, record.grid[0] * side)))
    cells = record.prompt.visuals[0].cells
    last = len(cells) > 1 and cells[-1].role == "overview"
    tile = pixels.flatten(0, -4)[-1 if last else 0].float()
    if getattr(maker, "do_normalize", True):
        mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in (maker.image_mean, maker.image_std))
        tile = tile * deviation + mean
    return tile.clamp(0, 1)
