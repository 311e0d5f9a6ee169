"""The two real models that every tool is tried on: average pooling, so that token sizes matter, and random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

import vtoken
from tests.helpers import images, randomise_, vit

PITOME = vtoken.PiToMe(ratio=0.8)


@dataclass(frozen=True)
class Tower:
    """One model.

    Args:
        name: of the row.
        build: makes it with its library's own initial weights.
        blocks: where its blocks are.
        lora: names of the layers that adapters go to.
        tokens: before block 0 and after every block under `PITOME`.
    """

    name: str
    build: Callable[[], nn.Module]
    blocks: str
    lora: tuple[str, ...]
    tokens: list[int]

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """A new one with the same random weights every time, in eval mode."""
        return randomise_(self.build(), 0).to(dtype).eval()

    def images(self, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Images that fit it."""
        return images((3, 32, 32), batch, seed, dtype)


def _open_clip() -> nn.Module:
    return VisionTransformer(
        image_size=32, patch_size=4, width=32, layers=3, heads=4, mlp_ratio=2.0, output_dim=10, pool_type="avg"
    )


TIMM = Tower(
    "timm",
    lambda: vit(global_pool="avg", class_token=True, reg_tokens=2),
    "blocks",
    ("qkv", "attn.proj"),
    [67, 55, 45, 37],
)
OPEN_CLIP = Tower("open_clip", _open_clip, "transformer.resblocks", ("attn", "c_fc"), [65, 53, 43, 35])
TOWERS = [TIMM, OPEN_CLIP]

every_tower = pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower.name)
either_order = pytest.mark.parametrize("first", ["vtoken first", "tool first"])


def loss_of(out: Tensor) -> Tensor:
    """A loss in which every output counts differently."""
    weight = torch.linspace(-1, 2, out.shape[1], dtype=out.dtype)
    return (out.square() @ weight).mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every gradient that is there."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
