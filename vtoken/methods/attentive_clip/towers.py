"""The models whose image towers attentive masking can train; how a tower runs is its host's knowledge."""

from __future__ import annotations

from typing import Any

import open_clip
from torch import nn

from vtoken.core.host import HostAdapter, find_adapter, refuse_compiled
from vtoken.core.spec import HostSpec, PatchSpec
from vtoken.errors import UnsupportedModelError


def tower_of(model: nn.Module) -> tuple[HostAdapter, HostSpec, PatchSpec]:
    """What is known of the image tower of a CLIP, and the adapter that runs it (given `model.visual`).

    Raises:
        UnsupportedModelError: if attentive masking cannot train it, with the reason.
        ConfigError: if it drops patches itself.
    """
    if not isinstance(model, (open_clip.CLIP, open_clip.CustomTextCLIP)):
        raise _refused(f"{type(model).__module__}.{type(model).__qualname__} is not a CLIP that it knows")
    adapter, visual = find_adapter(model), model.visual
    refuse_compiled(model, "wrap")
    spec: Any = adapter.spec(model)
    if spec.num_prefix == 0 or not spec.class_token:
        raise _refused(f"its image tower ({spec.name}) has no class token, so no class query could say what matters")
    if spec.position == "rotary":
        raise _refused(f"its image tower ({spec.name}) rotates queries and keys by position")
    return adapter, spec, adapter.patch_spec(visual)


def _refused(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"cannot train with attentive masks: {why}. Supported: open_clip CLIP and CustomTextCLIP whose image tower is "
        "open_clip's VisionTransformer or a timm VisionTransformer with a class token."
    )
