"""Models that cannot lose tokens are refused, by name and with the reason, and left as they were.

Source: docs/methods/pitome.md 11.1.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, DiffParallelScalingBlock, ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

import vtoken
from tests.contract.table import snapshot
from tests.helpers import vit

# One or two architectures of every family of docs/methods/pitome.md 11.1, with a word of the reason.
_WINDOW = "windows"
_GRID = "grid|stages"
_TABLE = "position bias"
REFUSED = {
    "swin_tiny_patch4_window7_224": _WINDOW,
    "swinv2_tiny_window8_256": _WINDOW,
    "swinv2_cr_tiny_224": _WINDOW,
    "maxvit_tiny_tf_224": _WINDOW,
    "coatnet_0_rw_224": "windows|table|grid",
    "mvitv2_tiny": _GRID,
    "hiera_tiny_224": _GRID,
    "samvit_base_patch16": _WINDOW,
    "sam2_hiera_tiny": "windows|grid",
    "vit_relpos_small_patch16_224": _TABLE,
    "vit_srelpos_small_patch16_224": _TABLE,
    "vit_relpos_base_patch32_plus_rpn_256": _TABLE,
    "beit_base_patch16_224": _TABLE,
    "beitv2_base_patch16_224": _TABLE,
    "gcvit_xxtiny": _WINDOW,
    "twins_svt_small": _WINDOW,
    "twins_pcpvt_small": "windows|grid",
    "pvt_v2_b0": _GRID,
    "pit_ti_224": _GRID,
    "levit_128s": _GRID,
    "efficientformer_l1": _GRID,
    "efficientformerv2_s0": _GRID,
    "xcit_nano_12_p16_224": "channels",
    "cait_xxs24_224": "class token",
    "volo_d1_224": "class token|grid",
    "tnt_s_patch16_224": "patch",
    "crossvit_tiny_240": "branches",
    "davit_tiny": _WINDOW,
    "nest_tiny": _WINDOW,
    "mobilevit_s": "ByobNet",
    "mobilevitv2_050": "ByobNet",
    "vit_base_patch16_xp_224": "parallel",
    "vit_small_patch16_18x2_224": "side by side",
    "resnet18": "plain-attention",
    "convnext_atto": "plain-attention",
    "mixer_s16_224": "plain-attention",
}


def _refused(model: nn.Module, why: str) -> str:
    """Apply must raise, name the class, and change nothing; returns the message."""
    before, training = snapshot(model), model.training
    for verb in (vtoken.apply, vtoken.plan, vtoken.report):
        with pytest.raises(vtoken.UnsupportedModelError) as caught:
            verb(model, vtoken.PiToMe(ratio=0.9))
        message = str(caught.value)
        assert type(model).__name__ in message
        assert re.search(why, message), f"{why!r} not in {message!r}"
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, vtoken.VTokenError)
    assert snapshot(model) == before
    assert model.training == training
    assert not vtoken.is_applied(model)
    return message


@pytest.mark.parametrize("name", [n for n in REFUSED if timm.is_model(n)])
def test_unsupported_timm_architectures(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    message = _refused(model, REFUSED[name])
    assert "left as it was" in message
    assert "VisionTransformer" in message, "the supported models are named"


def test_enough_architectures_are_refused() -> None:
    assert sum(timm.is_model(n) for n in REFUSED) >= 30


_TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}


@pytest.mark.parametrize("block", [ParallelScalingBlock, DiffParallelScalingBlock])
def test_parallel_blocks(block: type) -> None:
    message = _refused(VisionTransformer(**_TINY, block_fn=block), "parallel")
    assert block.__name__ in message
    assert "blocks.0" in message


def test_differential_attention() -> None:
    message = _refused(VisionTransformer(**_TINY, attn_layer="diff"), "[Dd]ifferential")
    assert "DiffAttention" in message


def test_supported_model_with_one_foreign_block() -> None:
    """Half understood is not understood."""
    model = VisionTransformer(**_TINY)
    model.blocks[1] = nn.TransformerEncoderLayer(32, 4, batch_first=True)
    message = _refused(model, "TransformerEncoderLayer")
    assert "blocks.1" in message
    model.blocks[1] = nn.Identity()
    assert "blocks.1" in _refused(model, "Identity")


class OwnForwardBlock(Block):
    """A user's block that computes something else."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(x, attn_mask, is_causal) * 0.5


class QuietBlock(Block):
    """A user's block that only adds a helper."""

    def width(self) -> int:
        return self.norm1.normalized_shape[0]


class OwnAttention(Attention):
    """A user's attention with a forward of its own."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(x, attn_mask, is_causal) * 0.5


def test_user_block_with_its_own_forward() -> None:
    message = _refused(VisionTransformer(**_TINY, block_fn=OwnForwardBlock), "forward of its own")
    assert "OwnForwardBlock" in message


def test_user_block_that_leaves_forward_alone_is_fine() -> None:
    model = VisionTransformer(**_TINY, block_fn=QuietBlock).eval()
    vtoken.apply(model, vtoken.PiToMe(ratio=0.5))
    assert type(model.blocks[0]).__name__ == "QuietBlock"
    assert model.blocks[0].width() == 32
    _, trace = vtoken.trace(model, torch.randn(1, 3, 32, 32))
    assert trace.tokens == [17, 9, 5]
    vtoken.remove(model)
    assert type(model.blocks[0]) is QuietBlock


def test_user_attention_with_its_own_forward() -> None:
    assert "OwnAttention" in _refused(VisionTransformer(**_TINY, attn_layer=OwnAttention), "")


def test_instance_forward_is_not_bypassed() -> None:
    model = VisionTransformer(**_TINY)
    model.blocks[1].forward = lambda x, **kwargs: x
    assert "blocks.1" in _refused(model, "forward of its own")
    model = VisionTransformer(**_TINY)
    model.blocks[0].attn.forward = lambda x, **kwargs: x
    assert "blocks.0" in _refused(model, "")


class OwnPool(VisionTransformer):
    """A user's model with a pooling that knows nothing of sizes."""

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return x[:, 1:].mean(1)


def test_own_pooling_of_merged_tokens_is_refused() -> None:
    model = OwnPool(**_TINY, global_pool="avg", class_token=True)
    _refused(model, "pool")


def test_model_without_blocks() -> None:
    model = VisionTransformer(**(_TINY | {"depth": 2}))
    model.blocks = nn.Sequential()
    _refused(model, "no blocks")


def test_modules_that_are_no_towers() -> None:
    for model in (nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)), nn.Sequential(vit()), nn.Module()):
        with pytest.raises(vtoken.UnsupportedModelError, match=type(model).__name__):
            vtoken.apply(model, vtoken.PiToMe())
    assert not vtoken.is_applied(model)


def test_things_that_are_no_modules() -> None:
    for thing in ("vit_base_patch16_224", None, VisionTransformer, lambda x: x):
        with pytest.raises(vtoken.UnsupportedModelError, match="Module"):
            vtoken.apply(thing, vtoken.PiToMe())  # type: ignore[type-var]


def test_torchvision_vit() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3
    )
    message = _refused(model, "torchvision")
    assert "timm" in message


def test_feature_extractors_are_refused_not_half_patched() -> None:
    model = timm.create_model("test_vit", features_only=True, pretrained=False)
    before = snapshot(model)
    with pytest.raises(vtoken.UnsupportedModelError):
        vtoken.apply(model, vtoken.PiToMe())
    assert snapshot(model) == before


class DistributedDataParallel(nn.Module):
    """Looks like torch's wrapper, without processes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_wrapped_models_name_the_inner_module() -> None:
    inner = vit()
    for wrapped in (DistributedDataParallel(inner), nn.DataParallel(inner)):
        with pytest.raises(vtoken.VTokenError, match=r"model\.module"):
            vtoken.apply(wrapped, vtoken.PiToMe())
    with pytest.raises(vtoken.VTokenError, match=r"model\._orig_mod"):
        vtoken.apply(torch.compile(inner, backend="eager"), vtoken.PiToMe())
    assert not vtoken.is_applied(inner)
    inner.compile(backend="eager")
    with pytest.raises(vtoken.VTokenError, match="compil"):
        vtoken.apply(inner, vtoken.PiToMe())
    assert not vtoken.is_applied(inner)


def test_settings_that_do_not_fit_leave_the_model_alone() -> None:
    model = vit()
    before = snapshot(model)
    for config in (
        vtoken.PiToMe(ratio=(0.9, 0.9)),
        vtoken.PiToMe(margin=(0.1,) * 7),
        vtoken.ToMe(r=(1, 2, 3, 4)),
        vtoken.StrideMerge(layers=(3,)),
    ):
        with pytest.raises(vtoken.ConfigError, match="blocks"):
            vtoken.apply(model, config)
        assert snapshot(model) == before
