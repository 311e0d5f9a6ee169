"""Small towers of every family of transformers that the contract table does not list, and what is asked of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers as hf
from torch import nn

_SIZE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4, "image_size": 32,
}  # fmt: skip
_PLAIN = _SIZE | {"intermediate_size": 64}
_TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Tower:
    """A class of towers, or one that holds a tower.

    Args:
        build: makes it with 64 patches, width 32 and 3 layers.
        prefix: tokens in front of the patches.
        any_size: how a call says that images have another size than the configuration's; None: it cannot.
        dense: whether what it hands out has a value for every patch.
        alone: whether a call takes one image.
        frames: of a video; 0: it takes images.
        grid: patch rows and columns of all frames.
    """

    build: Callable[[], nn.Module]
    prefix: int
    any_size: dict[str, Any] | None
    dense: bool = False
    alone: bool = False
    frames: int = 0
    grid: tuple[int, int] = (8, 8)


def _made(cls: str, config: str, sizes: dict[str, Any] = _PLAIN, /, **options: Any) -> nn.Module:
    return getattr(hf, cls)(getattr(hf, config)(**sizes, **options))  # type: ignore[no-any-return]


def _over_maps(cls: str, config: str, *, reshape: bool, **options: Any) -> nn.Module:
    """A model over the maps of a DINOv2 backbone."""
    stages = {"out_features": ["stage1", "stage2", "stage3"], "reshape_hidden_states": reshape}
    backbone = hf.Dinov2Config(**_RATIO, **stages)
    return getattr(hf, cls)(getattr(hf, config)(backbone_config=backbone, **options))  # type: ignore[no-any-return]


def _both(cls: str, config: str, **options: Any) -> nn.Module:
    """A classifier over the image tower of a two-tower configuration."""
    made = getattr(hf, config)(vision_config=_PLAIN, text_config=_TEXT, num_labels=10, **options)
    return getattr(hf, cls)(made)  # type: ignore[no-any-return]


_part = functools.partial
_RESIZE = {"interpolate_pos_encoding": True}
_RATIO = _SIZE | {"mlp_ratio": 2}
_DEPTH = {
    "patch_size": 4, "reassemble_hidden_size": 32, "reassemble_factors": [2, 1, 0.5], "neck_hidden_sizes": [8, 8, 8],
    "fusion_hidden_size": 8, "head_hidden_size": 8,
}  # fmt: skip
_DPT = {
    "hidden_size": 32, "neck_hidden_sizes": [8, 8, 8], "reassemble_factors": [2, 1, 0.5], "fusion_hidden_size": 8,
    "neck_ignore_stages": [],
}  # fmt: skip
_ZOE = {
    "neck_hidden_sizes": [8, 8, 8], "fusion_hidden_size": 8, "bottleneck_features": 8, "num_relative_features": 8,
    "reassemble_factors": [2, 1, 0.5], "add_projection": False,
}  # fmt: skip
_UPERNET = {"hidden_size": 8, "auxiliary_in_channels": 32, "auxiliary_channels": 8}
_VIDEO = {k: v for k, v in _PLAIN.items() if k != "patch_size"} | {"num_frames": 8}
_TUBES = _VIDEO | {"patch_size": 8, "tubelet_size": 2}
_STAGES = {"out_features": ["stage1", "stage3"]}

TOWERS: dict[str, Tower] = {
    "metaclip_2": Tower(_part(_made, "MetaClip2VisionModel", "MetaClip2VisionConfig"), 1, _RESIZE),
    "metaclip_2_mean": Tower(_part(_both, "MetaClip2ForImageClassification", "MetaClip2Config"), 1, _RESIZE),
    "altclip": Tower(_part(_made, "AltCLIPVisionModel", "AltCLIPVisionConfig"), 1, _RESIZE),
    "chinese_clip": Tower(_part(_made, "ChineseCLIPVisionModel", "ChineseCLIPVisionConfig"), 1, _RESIZE),
    "vit_msn": Tower(_part(_made, "ViTMSNForImageClassification", "ViTMSNConfig", num_labels=10), 1, _RESIZE),
    "ijepa": Tower(_part(_made, "IJepaModel", "IJepaConfig"), 0, _RESIZE),
    "ijepa_mean": Tower(_part(_made, "IJepaForImageClassification", "IJepaConfig", num_labels=10), 0, _RESIZE),
    "aimv2": Tower(_part(_made, "Aimv2VisionModel", "Aimv2VisionConfig"), 0, None),
    "aimv2_native": Tower(_part(_made, "Aimv2VisionModel", "Aimv2VisionConfig", is_native=True), 0, {}),
    "pixio": Tower(_part(_made, "PixioModel", "PixioConfig", _RATIO, n_cls_tokens=3), 3, {}),
    "tipsv2": Tower(_part(_made, "Tipsv2VisionModel", "Tipsv2VisionConfig", _RATIO), 2, {}),
    "tipsv2_maps": Tower(_part(_made, "Tipsv2VisionBackbone", "Tipsv2VisionConfig", _RATIO, **_STAGES), 2, {}, True),
    "dinov3": Tower(_part(_made, "DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4), 5, {}),
    "dinov3_gated": Tower(_part(_made, "DINOv3ViTModel", "DINOv3ViTConfig", use_gated_mlp=True), 1, {}),
    "dinov3_maps": Tower(
        _part(_made, "DINOv3ViTBackbone", "DINOv3ViTConfig", num_register_tokens=2, **_STAGES), 3, {}, True
    ),
    "pixio_maps": Tower(_part(_made, "PixioBackbone", "PixioConfig", _RATIO, n_cls_tokens=3, **_STAGES), 3, {}, True),
    "pixtral": Tower(_part(_made, "PixtralVisionModel", "PixtralVisionConfig"), 0, {}, alone=True),
    "radio": Tower(_part(_made, "RadioModel", "RadioConfig", _SIZE, mlp_ratio=2.0, max_img_size=64), 10, {}),
    "clipseg": Tower(_part(_made, "CLIPSegVisionModel", "CLIPSegVisionConfig"), 1, {}),
    "vit_mae": Tower(_part(_made, "ViTMAEModel", "ViTMAEConfig", mask_ratio=0.5), 1, _RESIZE, grid=(1, 32)),
    "vitpose": Tower(
        _part(_made, "VitPoseBackbone", "VitPoseBackboneConfig", _RATIO | {"patch_size": 8}, **_STAGES),
        0,
        None,
        True,
        grid=(4, 4),
    ),
    "vivit": Tower(
        _part(_made, "VivitModel", "VivitConfig", _VIDEO, tubelet_size=[2, 8, 8]), 1, None, frames=8, grid=(16, 4)
    ),
    "vivit_head": Tower(
        _part(_made, "VivitForVideoClassification", "VivitConfig", _VIDEO, tubelet_size=[2, 8, 8]),
        1,
        None,
        frames=8,
        grid=(16, 4),
    ),
    "videomae": Tower(_part(_made, "VideoMAEModel", "VideoMAEConfig", _TUBES), 0, None, frames=8, grid=(16, 4)),
    "videomae_mean": Tower(
        _part(_made, "VideoMAEForVideoClassification", "VideoMAEConfig", _TUBES), 0, None, frames=8, grid=(16, 4)
    ),
    "depth_anything": Tower(
        _part(_over_maps, "DepthAnythingForDepthEstimation", "DepthAnythingConfig", reshape=False, **_DEPTH),
        1,
        {},
        True,
    ),
    "dpt": Tower(_part(_over_maps, "DPTForDepthEstimation", "DPTConfig", reshape=False, **_DPT), 1, {}, True),
    "zoedepth": Tower(
        _part(_over_maps, "ZoeDepthForDepthEstimation", "ZoeDepthConfig", reshape=False, **_ZOE), 1, {}, True
    ),
    "git": Tower(_part(_made, "GitVisionModel", "GitVisionConfig"), 1, _RESIZE),
    "upernet": Tower(
        _part(_over_maps, "UperNetForSemanticSegmentation", "UperNetConfig", reshape=True, **_UPERNET), 1, {}, True
    ),
}
