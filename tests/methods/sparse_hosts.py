"""Small models for the tests of attention methods, with predictors whose every part matters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

import vtoken
from tests.helpers import GatedAttention, Host, distilled, vit
from vtoken.core.host import find_adapter
from vtoken.train import predictor_parameters

GRID = (4, 6)
_SMALL: dict[str, Any] = {"img_size": (16, 24), "embed_dim": 16, "num_heads": 2}
_small = functools.partial(vit, **_SMALL)


def open_clip_tower(batch_first: bool = True, **options: Any) -> nn.Module:
    """open_clip's tower, whose blocks may run with the batch as their second side."""
    transformer = pytest.importorskip("open_clip.transformer")
    tower = transformer.VisionTransformer(
        image_size=(16, 24), patch_size=4, width=16, layers=3, heads=2, mlp_ratio=2.0, output_dim=8, **options
    )
    tower.transformer.batch_first = batch_first
    for block in tower.transformer.resblocks:
        block.attn.batch_first = batch_first
    return tower  # type: ignore[no-any-return]


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "cls": _small,
    "registers": functools.partial(_small, reg_tokens=2, qk_norm=True),
    "no prefix": functools.partial(_small, global_pool="avg", init_values=1e-5),
    "scaled": functools.partial(_small, scale_attn_norm=True, scale_mlp_norm=True),
    "gated": functools.partial(_small, attn_layer=GatedAttention, reg_tokens=1),
    "respost": functools.partial(_small, block_fn=ResPostBlock, init_values=1e-5),
    "open_clip": functools.partial(open_clip_tower, ls_init_value=1e-5),
    "open_clip rows first": functools.partial(open_clip_tower, batch_first=False),
}
HOSTS = {name: Host(name, build, (3, *(4 * n for n in GRID))) for name, build in _BUILDERS.items()}
DISTILLED = Host("distilled", distilled)


def blocks(model: nn.Module) -> list[Any]:
    """The blocks in order."""
    return [block for _, block in find_adapter(model).blocks(model)]


def taught(model: Any, seed: int = 0) -> Any:
    """The same model with random predictors: signed bases, coefficients far from uniform, biases, own thresholds."""
    rng = torch.Generator().manual_seed(seed)

    def normal(p: Tensor, std: float) -> None:
        p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64) * std)

    with torch.no_grad():
        for name, p in predictor_parameters(model):
            normal(p, 0.4 if "reduce" in name else 0.25 if "down" in name else 0.1)
        for name, b in model.named_buffers():
            if name.endswith("predictor.threshold"):
                b.copy_(torch.rand(b.shape, generator=rng, dtype=torch.float64) * 0.04 + 0.02)
    return model


def sparse(model: Any, config: Any = None, seed: int = 0, **options: Any) -> Any:
    """`vtoken.apply` of Sparsifiner and `taught`."""
    vtoken.apply(model, vtoken.Sparsifiner(**options) if config is None else config)
    return taught(model, seed)


def block_rows(model: Any, x: Tensor) -> tuple[Tensor, Tensor, vtoken.Trace]:
    """What enters the first block and leaves the last one, [B, T, C], with a trace that holds every map."""
    seen: list[Tensor] = []
    first, last = blocks(model)[0], blocks(model)[-1]
    handles = [
        first.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
        last.register_forward_hook(lambda module, args, out: seen.append(out)),
    ]
    with torch.no_grad(), vtoken.tracing(model, maps=("mask", "scores", "attention")) as trace:
        model(x)
    for handle in handles:
        handle.remove()
    if not getattr(getattr(first, "attn", None), "batch_first", True):
        seen = [rows.transpose(0, 1) for rows in seen]
    return seen[0], seen[1], trace
