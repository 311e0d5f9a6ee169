"""Frames scored by an open_clip model: the cheap scorer (docs/methods/quota.md 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vtoken import checks
from vtoken.accounting.vision import Tower, tower_flops
from vtoken.errors import ConfigError
from vtoken.video.decouple import Clue
from vtoken.video.pictures import to_image
from vtoken.video.scorers import checked, evaluating

REDUCES = ("max", "mean")
SCALES = ("minmax", "softmax", "sigmoid")


class CLIPScorer:
    """Cosine of frame and text embeddings of an open_clip model, as scores.

    The texts are the clue's items, or the question. A model that carries a method (`vtoken.apply`) scores faster.

    Args:
        model: an open_clip `CLIP`, `CustomTextCLIP` or another model with `encode_image` and `encode_text`.
        tokenizer: of `open_clip.get_tokenizer`.
        preprocess: from a pillow image to the model's input [3, H, W]; of `open_clip.create_model_and_transforms`.
        reduce: over the texts, "max" or "mean".
        scale: "minmax" (0 to 1 over the video; 0.5 if all are equal), "softmax" over the frames by the model's logit
            scale, or "sigmoid" by logit scale and bias (models trained as SigLIP).
        batch_size: frames per call of the image tower.

    Raises:
        ConfigError: if the model has no two encoders, an option is unknown, or "sigmoid" is asked of a model without
            logit bias.

    Example:
        >>> import open_clip, torch, vtoken
        >>> tower = dict(layers=1, width=64, head_width=32, patch_size=16, image_size=32)
        >>> clip = open_clip.CLIP(32, tower, dict(layers=1, width=64, heads=2)).eval()  # yours has weights
        >>> scorer = vtoken.video.CLIPScorer(clip, open_clip.tokenize, lambda image: torch.rand(3, 32, 32))
        >>> clue = vtoken.video.Clue("objects", ("shoe", "bag"), "Where is the shoe?")
        >>> scorer.score([torch.rand(3, 40, 40)] * 3, clue).shape
        torch.Size([3])

    Source: arXiv 2503.08689, ablation of scorers.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Callable[[list[str]], Tensor],
        preprocess: Callable[[Any], Tensor],
        *,
        reduce: str = "max",
        scale: str = "minmax",
        batch_size: int = 32,
    ) -> None:
        checks.choice("CLIPScorer", "reduce", reduce, REDUCES)
        checks.choice("CLIPScorer", "scale", scale, SCALES)
        batch_size = checks.whole("CLIPScorer", "batch_size", batch_size, 1)
        if not all(callable(getattr(model, name, None)) for name in ("encode_image", "encode_text")):
            raise ConfigError(
                f"CLIPScorer takes an open_clip model with encode_image and encode_text, not a {type(model).__name__}"
            )
        for name, function in (("tokenizer", tokenizer), ("preprocess", preprocess)):
            if not callable(function):
                raise ConfigError(f"CLIPScorer({name}={function!r}): must be a function; open_clip has them")
        if scale == "sigmoid" and getattr(model, "logit_bias", None) is None:
            raise ConfigError(
                f'scale="sigmoid" needs a logit bias, which this {type(model).__name__} does not have; use "minmax"'
            )
        self.model, self.tokenizer, self.preprocess = model, tokenizer, preprocess
        self.reduce, self.scale, self.batch_size = reduce, scale, batch_size

    def score(self, frames: Sequence[Any], clue: Clue) -> Tensor:
        """Scores [T], float32 on the CPU."""
        if not len(frames):
            return torch.zeros(0)
        with evaluating(self.model):
            cosines = self.cosines(frames, list(clue.items) or [clue.text])
            reduced = cosines.amax(1) if self.reduce == "max" else cosines.mean(1)
            scores = self._scaled(reduced)
        return checked(scores, len(frames), "CLIPScorer")

    def cosines(self, frames: Sequence[Any], texts: list[str]) -> Tensor:
        """Cosine of every frame with every text, [T, K] float32."""
        like = next(self.model.parameters())
        embedded = []
        for start in range(0, len(frames), self.batch_size):
            batch = [self.preprocess(to_image(frame)) for frame in frames[start : start + self.batch_size]]
            embedded.append(_unit(self.model.encode_image(torch.stack(batch).to(like.device, like.dtype))))
        return torch.cat(embedded) @ _unit(self.model.encode_text(self.tokenizer(texts).to(like.device))).T

    def flops(self, frames: Sequence[Any], clue: Clue) -> int | None:
        """FLOPs of the image tower's blocks (the texts are few); None for towers that are no plain open_clip ViT."""
        visual = self.model.visual
        try:
            trunk, (height, width) = visual.transformer, visual.grid_size
            tower = Tower(trunk.layers, trunk.width, trunk.resblocks[0].mlp[0].out_features)
        except AttributeError:
            return None
        return len(frames) * tower_flops(tower, 1 + height * width)

    def _scaled(self, cosines: Tensor) -> Tensor:
        if self.scale == "minmax":
            low, high = cosines.min(), cosines.max()
            return (cosines - low) / (high - low) if high > low else torch.full_like(cosines, 0.5)
        logits = cosines * self.model.logit_scale.exp().float()
        if self.scale == "softmax":
            return logits.softmax(0)
        return (logits + self.model.logit_bias.float()).sigmoid()


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)
