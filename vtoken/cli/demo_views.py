"""The pictures on the demo's page: merged groups by ratio, kept patches by budget, the frame budgets of a clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vtoken.core.trace import Trace
from vtoken.demo.saliency import SaliencyViT, normalise
from vtoken.hosts.class_rows import cls_attention_scores
from vtoken.ops import allocate_tokens, select_tokens
from vtoken.visualize import draw_groups, draw_image, draw_kept
from vtoken.visualize.frames import mosaic
from vtoken.visualize.page import Panel, View
from vtoken.visualize.pixels import to_picture

_MOST = 6  # photographs in the views that need forwards of their own
_BUDGETS = (192, 128, 64, 32, 16)
_SHARES = (1.0, 0.5, 0.25, 0.1)
_THUMBNAIL = 128
_GROUPS = (
    "Every group of merged patches in its mean colour, after the last block. PiToMe keeps what stands out and merges "
    "what repeats itself; ToMe merges what is alike wherever it is."
)
_KEPT = (
    "How VTC-CLS and its kind choose the image tokens that a language model gets: those that the class token attends "
    "to. This model's class token was damaged when it was tuned for saliency, so the pictures show how a choice "
    "works, not how well a CLIP tower chooses."
)
_FRAMES = (
    "A clip that pans over photographs, with a token budget spread by QuoTA's rule over its frames, by their likeness "
    "to the photograph that is sought (cosines of mean features; a question in words needs a CLIP: python -m vtoken "
    "video). Frames are painted with one colour a token."
)


def merged_groups(
    photographs: Tensor, names: Sequence[str], ratios: Sequence[float], records: Mapping[tuple[str, float], Trace]
) -> View:  # fmt: skip
    """Every photograph beside its groups.

    Args:
        photographs: [B, 3, S, S] in [0, 1].
        names: of the photographs.
        ratios: steps of the slider.
        records: of the method, as it is called in captions, and a ratio: a forward of all photographs.
    """
    methods = list(dict.fromkeys(method for method, _ in records))

    def panels(index: int, ratio: float) -> list[Panel]:
        found = [Panel(draw_image(photographs[index]), names[index])]
        for method in methods:
            record = records[method, ratio]
            picture = draw_groups(photographs[index], record, index=index, scale=2)
            found.append(Panel(picture, method, {"groups": record.tokens[-1] - record.num_prefix}))
        return found

    rows = [[panels(index, ratio) for ratio in ratios] for index in range(len(names))]
    return View("Merged groups", _GROUPS, "photograph", names, "ratio kept per layer", ratios, rows)


def kept_patches(model: SaliencyViT, photographs: Tensor, names: Sequence[str]) -> View:
    """Photographs [B, 3, S, S] in [0, 1] beside what is kept of them, by the attention of the class token."""
    photographs, names = photographs[:_MOST], names[:_MOST]
    scores = cls_attention_scores(model.backbone, normalise(photographs))
    rows, columns = model.backbone.patch_embed.grid_size
    grid = (int(rows), int(columns))

    def panels(index: int, budget: int) -> list[Panel]:
        kept = select_tokens(scores[index], budget)
        picture = draw_kept(photographs[index], kept, grid)
        return [Panel(draw_image(photographs[index]), names[index]), Panel(picture, "kept", {"patches": len(kept)})]

    views = [[panels(index, budget) for budget in _BUDGETS] for index in range(len(names))]
    return View("Kept tokens", _KEPT, "photograph", names, "tokens kept", _BUDGETS, views)


def frame_budgets(model: SaliencyViT, photographs: Tensor, names: Sequence[str]) -> View:
    """A clip over the photographs [B, 3, S, S] in [0, 1], and the tokens of its frames for each that is sought."""
    photographs, names = photographs[:_MOST], names[:_MOST]
    frames = panned(photographs)
    rows, columns = model.backbone.patch_embed.grid_size
    native = int(rows) * int(columns)
    with torch.inference_mode():
        sought, seen = (
            F.normalize(model.features(normalise(pictures))[1].mean((2, 3)), dim=1)
            for pictures in (photographs, frames)
        )
    cosines = sought @ seen.T
    low, high = cosines.amin(1, keepdim=True), cosines.amax(1, keepdim=True)
    scores = (cosines - low) / (high - low).clamp(min=1e-6)
    small = F.interpolate(frames, _THUMBNAIL, mode="area").clamp(0, 1)
    thumbnails = rearrange((small * 255).round().to(torch.uint8), "t c h w -> t h w c")

    def panels(index: int, share: float) -> list[Panel]:
        tokens = allocate_tokens(scores[index], round(share * native * len(frames)), max_tokens=native)
        found = []
        for number, count in enumerate(tokens):
            pixels = mosaic(thumbnails[number], count, (int(rows), int(columns)))
            values = {"score": round(float(scores[index, number]), 3), "tokens": count}
            picture = to_picture(rearrange(pixels.float() / 255, "h w c -> c h w"))
            found.append(Panel(picture, f"frame {number}", values, count / native))
        return found

    views = [[panels(index, share) for share in _SHARES] for index in range(len(names))]
    return View("Frame budgets of a clip", _FRAMES, "sought", names, "share of the tokens", _SHARES, views)


def panned(photographs: Tensor, steps: int = 3) -> Tensor:
    """A clip [B * steps, 3, S, S] from side to side of every photograph [B, 3, S, S], enlarged by a quarter."""
    size = photographs.shape[-1]
    large = F.interpolate(photographs, size * 5 // 4, mode="bicubic", antialias=True).clamp(0, 1)
    room = large.shape[-1] - size
    lefts = [room * step // max(steps - 1, 1) for step in range(steps)]
    pieces = torch.stack([large[:, :, room // 2 : room // 2 + size, left : left + size] for left in lefts], 1)
    return pieces.flatten(0, 1)
