"""The models whose image towers attentive masking can train; how a tower runs is its host's knowledge."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtoken.core.host import HostAdapter, matching_adapter, refuse_compiled
from vtoken.core.spec import HostSpec, Pair, PatchSpec
from vtoken.errors import UnsupportedModelError


def pair_of(model: nn.Module) -> tuple[HostAdapter, Pair, HostSpec, PatchSpec]:
    """The adapter that runs the image tower of a CLIP, the CLIP's parts, and what is known of the tower.

    Raises:
        UnsupportedModelError: if attentive masking cannot train it, with the reason.
        ConfigError: if it drops patches itself.
    """
    adapter = matching_adapter(model) if isinstance(model, nn.Module) else None
    pair = None if adapter is None else adapter.pair(model)
    if adapter is None or pair is None:
        raise _refused(f"{type(model).__module__}.{type(model).__qualname__} is not a CLIP that it knows")
    refuse_compiled(model, "wrap")
    spec: Any = adapter.spec(model)
    if spec.position == "rotary":
        raise _refused(f"its image tower ({spec.name}) rotates queries and keys by position")
    patches = adapter.patch_spec(getattr(model, pair.tower))
    if not (spec.num_prefix and spec.class_token) and not patches.pool_query:
        raise _refused(
            f"its image tower ({spec.name}) has no class token, nor an attention pool with one query, so nothing says "
            "what matters"
        )
    return adapter, pair, spec, patches


def _refused(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"cannot train with attentive masks: {why}. Supported: open_clip CLIP and CustomTextCLIP whose image tower is "
        "open_clip's VisionTransformer or a timm VisionTransformer, and transformers' CLIPModel, SiglipModel and their "
        "like, with a class token or an attention pool."
    )
