"""Thresholds for Sparsifiner's mode="threshold", from sample images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vtoken import checks
from vtoken.core.apply import configure
from vtoken.core.carried import config_tuple
from vtoken.core.host import find_adapter
from vtoken.core.patch import PREDICTOR
from vtoken.core.trace import tracing
from vtoken.errors import ShapeError, UnsupportedModelError, VTokenError


def calibrate_threshold(model: nn.Module, images: Tensor, density: float) -> dict[int, float]:
    """Set every head's threshold so that patch queries keep the share `density` of the keys, and switch to "threshold".

    The scores are those of a forward that keeps exactly that share per query, so what later blocks see is as sparse as
    it will be. The thresholds are buffers of the predictors and go into the state dict. The backend "grouped", which
    serves no thresholds, becomes "auto".

    Args:
        model: with Sparsifiner applied; in eval mode.
        images: a sample, [B, C, H, W]. All scores of one block, B * H * T * N numbers, are held at a time per block.
        density: share in (0, 1).

    Returns:
        The share that `images` then keep, by block.

    Raises:
        ConfigError: if density is out of range. ShapeError, InputError: if `images` are no images.
        VTokenError: if Sparsifiner is not applied.

    Example:
        >>> import timm, torch, vtoken
        >>> model = vtoken.apply(timm.create_model("test_vit").eval(), vtoken.Sparsifiner(keep_ratio=0.2))
        >>> found = vtoken.calibrate_threshold(model, torch.randn(2, 3, 160, 160), density=0.2)
        >>> vtoken.config_of(model).mode, len(found) == len(model.blocks)
        ('threshold', True)

    Source: docs/methods/sparsifiner.md 8.
    """
    what = "the share of keys to keep, "
    density = checks.number("calibrate_threshold", "density", density, above=0, below=1, what=what)
    if checks.tensor("calibrate_threshold", "images", images, 4, shape="[B, C, H, W]").shape[0] == 0:
        raise ShapeError("calibrate_threshold needs at least one image to see scores of")
    if [c.method for c in config_tuple(model)] != ["sparsifiner"]:
        raise VTokenError("calibrate_threshold needs a model with Sparsifiner, and nothing else, applied")
    before: Any = config_tuple(model)[0]
    run = _runner(model)
    predictors: dict[int, Any] = {
        m.__dict__["_vtoken_index"]: m.get_submodule(PREDICTOR)
        for m in model.modules()
        if "_vtoken_method" in m.__dict__
    }
    thresholds = {layer: predictor.threshold.clone() for layer, predictor in predictors.items()}
    try:
        with torch.no_grad():
            backend = "auto" if before.backend == "grouped" else before.backend
            configure(model, mode="exact", keep_ratio=density, phase="sparse", backend=backend)
            with tracing(model, maps=("scores",)) as found:
                run(model, images)
            for record in found.attention:
                assert record.scores is not None
                by_head = rearrange(record.scores, "b h query key -> h (b query key)")
                kept = max(1, round(density * by_head.shape[1]))
                # The largest score that is not kept: strictly more than it are `kept`, fewer where scores tie.
                limit = by_head.kthvalue(max(1, by_head.shape[1] - kept), dim=1).values
                predictors[record.layer].threshold.copy_(limit)
            configure(model, mode="threshold")
            with tracing(model) as reached:
                run(model, images)
    except BaseException:
        configure(model, **{name: getattr(before, name) for name in ("mode", "keep_ratio", "phase", "backend")})
        for layer, threshold in thresholds.items():
            predictors[layer].threshold.copy_(threshold)
        raise
    return {record.layer: record.density for record in reached.attention}


def _runner(model: nn.Module) -> Callable[[nn.Module, Tensor], Any]:
    """What runs the images of a model through its tower; a module around a patched one is called with them."""
    try:
        return find_adapter(model).run_image
    except UnsupportedModelError:
        return lambda around, images: around(images)
