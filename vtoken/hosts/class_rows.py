"""How much attention patches get in an image tower, asked for by itself."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from vtoken import checks
from vtoken.core.apply import is_applied
from vtoken.core.host import find_adapter, refuse_compiled
from vtoken.core.watch import Watch
from vtoken.errors import ConfigError, ShapeError, UnsupportedModelError, VTokenError
from vtoken.hosts.hidden_states import last_read
from vtoken.ops import ENSEMBLES, scored_layers


def cls_attention_scores(
    tower: Any,
    pixel_values: Tensor,
    *,
    start_layer: int | None = None,
    last: int | None = None,
    ensemble: str = "mean",
    how: str | None = None,
) -> Tensor:
    """How much the class token of a vision transformer attends to every patch, averaged over heads and layers.

    Args:
        tower: an unpatched transformers, open_clip or timm model with a class token, or a model that holds one.
            Queries and keys are read as they meet, behind their norms and rotation.
        pixel_values: images [B, C, H, W].
        start_layer, last: first and last block that is read; negative ones count from the end. By default from
            ceil(2/3 depth) to the last block, of a LLaVA to the block that its projector reads, as `vtoken.VTCCLS`.
        ensemble: "mean", "sum", "max" or "min" over the blocks.
        how: the old name of `ensemble`.

    Returns:
        Scores [B, N], float32, detached; rows sum to less than 1, the rest is what prefix tokens get.

    Raises:
        UnsupportedModelError: if the model is not understood, with the reason.
        ConfigError: if it has no class token, or for blocks that it does not have.
        ShapeError: if the images are not a batch.
        VTokenError: if it is patched.

    Example:
        >>> import timm, torch, vtoken
        >>> scores = vtoken.cls_attention_scores(timm.create_model("test_vit"), torch.randn(1, 3, 160, 160))
        >>> scores.shape
        torch.Size([1, 100])

    Source: arXiv 2412.05819.
    """
    if how is not None:
        warnings.warn("cls_attention_scores(how=...) is now called ensemble", DeprecationWarning, stacklevel=2)
        ensemble = how
    checks.choice("cls_attention_scores", "ensemble", ensemble, ENSEMBLES)
    adapter = find_adapter(tower)
    refuse_compiled(tower, "read scores")
    spec = adapter.spec(tower)
    if is_applied(tower):
        raise VTokenError(f"{spec.name} carries a method; use vtoken.remove first, or read the record of vtoken.trace")
    if spec.num_prefix == 0 or not spec.class_token:  # registers alone are no class token
        raise ConfigError(f"{spec.name} has no class token whose attention could be read")
    if isinstance(pixel_values, Tensor) and pixel_values.dim() != 4:
        raise ShapeError(f"expected images [B, C, H, W], got {tuple(pixel_values.shape)}")
    if last is None:
        last = last_read(getattr(tower, "config", None), spec.depth)
        if last < 0:
            raise ConfigError("the projector reads the embeddings themselves: no block is there to read attention from")
    watch = Watch(scored_layers(spec.depth, start_layer, last))
    with torch.no_grad():
        adapter.run_watched(tower, watch, pixel_values)
    if spec.position == "rotary" and not watch.rotated:
        raise UnsupportedModelError(f"cannot read class attention of {spec.name}: its rotation of keys is not shown")
    return watch.scores(spec.depth - 1, ensemble)[0][:, spec.num_prefix :]
