"""What the tests share: comparisons with useful messages, weights that matter, one small model of every structure."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@contextlib.contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """torch's counter, with attention as plain products: some releases count the fused form on a CPU as nothing."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def assert_close(name: str, ref: Tensor, got: Tensor, rtol: float) -> None:
    """Relative RMS error of `got` is at most `rtol`; the message names the worst element and both values."""
    assert ref.shape == got.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(ref.shape)}"
    if ref.numel() == 0:
        return
    expected, found = ref.detach().double(), got.detach().double()
    assert bool(found.isfinite().all()), f"{name}: {int((~found.isfinite()).sum())} of {found.numel()} not finite"
    scale = expected.square().mean().sqrt().clamp_min(1e-30)
    error = float((found - expected).square().mean().sqrt() / scale)
    if error > rtol:
        worst = int((found - expected).abs().argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ref.shape))
        values = f"expected {float(expected.flatten()[worst]):.9g}, got {float(found.flatten()[worst]):.9g}"
        raise AssertionError(f"{name}: relative RMS error {error:.3g} > {rtol:.3g}; worst at {where}: {values}")


def leaves(out: Any) -> Iterator[tuple[str, Any]]:
    """Path and value of every leaf of nested tuples, lists and dicts."""
    if isinstance(out, dict):
        items = list(out.items())
    elif isinstance(out, (tuple, list)):
        items = list(enumerate(out))
    else:
        yield "", out
        return
    for key, value in items:
        for path, leaf in leaves(value):
            yield f"[{key}]{path}", leaf


def assert_same(name: str, ref: Any, got: Any) -> None:
    """Two outputs (tensors or nests of them) are bit-equal."""
    expected, found = list(leaves(ref)), list(leaves(got))
    assert [p for p, _ in expected] == [p for p, _ in found], f"{name}: structure differs"
    for (path, a), (_, b) in zip(expected, found, strict=True):
        if not isinstance(a, Tensor):
            assert a == b, f"{name}{path}: expected {a!r}, got {b!r}"
            continue
        assert a.dtype == b.dtype, f"{name}{path}: dtype {b.dtype}, expected {a.dtype}"
        if not torch.equal(a, b):
            assert_close(f"{name}{path} (must be bit-equal)", a, b, 0.0)


def assert_all_close(name: str, ref: Any, got: Any, rtol: float) -> None:
    """`assert_close` over nests of tensors."""
    expected, found = list(leaves(ref)), list(leaves(got))
    assert [p for p, _ in expected] == [p for p, _ in found], f"{name}: structure differs"
    for (path, a), (_, b) in zip(expected, found, strict=True):
        assert_close(f"{name}{path}", a, b, rtol)


def randomise_(model: nn.Module, seed: int) -> nn.Module:
    """Weights under which every part of the network matters: no near-zero layer scale, bias, norm, head or token."""
    rng = torch.Generator().manual_seed(seed)

    def normal(p: Tensor, std: float) -> None:
        p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64) * std)

    def uniform(p: Tensor, low: float, high: float) -> None:
        p.copy_(torch.rand(p.shape, generator=rng, dtype=torch.float64) * (high - low) + low)

    with torch.no_grad():
        for name, p in model.named_parameters():
            leaf = name.rpartition(".")[2]
            if "rope" in name:  # mixed rotary frequencies: their own values are already random and not small
                continue
            if leaf.startswith(("gamma", "lambda", "logit_scale")) or (leaf == "weight" and p.dim() == 1):
                uniform(p, 0.5, 1.5)
            elif leaf == "class_embedding" or "position_embedding" in name:  # may be a vector, or an nn.Embedding
                normal(p, 0.6)
            elif p.dim() == 1:
                normal(p, 0.3)
            elif any(word in leaf for word in ("pos_embed", "positional_embedding", "token", "latent", "probe")):
                normal(p, 0.6)
            else:
                normal(p, (p[0].numel()) ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                normal(buffer, 0.2)
            elif name.endswith("running_var"):
                uniform(buffer, 0.5, 1.5)
    return model


def images(shape: tuple[int, ...], batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images [B, C, H, W] with smooth content plus noise, so that similarities straddle the margin."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, shape[0], 4, 4, generator=rng, dtype=torch.float64)
    smooth = nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear")
    return (smooth + 0.3 * torch.randn(batch, *shape, generator=rng, dtype=torch.float64)).to(dtype)


_SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 10,
}


def vit(**options: Any) -> nn.Module:
    """A plain timm VisionTransformer: 64 patches, width 32, 3 blocks."""
    return VisionTransformer(**(_SMALL | {"class_token": options.get("global_pool", "token") == "token"} | options))


class GatedAttention(Attention):
    """timm's attention with its output gate, which no timm name of these models turns on."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, gated=True, **options)


def distilled() -> nn.Module:
    """DeiT with a distillation token: two prefix tokens, two heads."""
    return VisionTransformerDistilled(**_SMALL)


def eva(**options: Any) -> nn.Module:
    """A timm Eva model; absolute positions and average pooling unless told otherwise."""
    return Eva(**(_SMALL | {"head_init_scale": 1.0} | options))


def naflex(**options: Any) -> nn.Module:
    """A timm NaFlexVit, made by name so that it has a configuration with an input size."""
    return timm.create_model("naflexvit_base_patch16_gap", **(_SMALL | options))


def hybrid() -> nn.Module:
    """A convolutional stem (with norms) in front of plain blocks."""
    return timm.create_model("vit_tiny_r_s16_p8_224", **(_SMALL | {"patch_size": 1}))


def vitamin() -> nn.Module:
    """ViTamin: MbConv stages, then plain blocks with a gated MLP."""
    conv = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
    stem = VitCfg(embed_dim=(16, 16, 32), depths=(1, 1, 1), stem_width=16, conv_cfg=conv, head_type="1d")
    small = _SMALL | {"img_size": 128}
    del small["patch_size"]
    return timm.create_model("vitamin_small_224", **small, embed_cfg=stem)


def unfused(model: nn.Module) -> nn.Module:
    """The model with explicit softmax attention instead of the fused kernel."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


@dataclass(frozen=True)
class Host:
    """One structure that vtoken serves.

    Args:
        name: of the row.
        build: makes it with the library's own initial weights.
        shape: channels, height and width of its images.
        library: that it comes from.
        prefix: class, register and distillation tokens; None: the model says so itself (timm).
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int] = (3, 32, 32)
    library: str = "timm"
    prefix: int | None = None

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        """A new, randomised model in eval mode."""
        return randomise_(_built(self), seed).to(dtype).eval()

    def images(self, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Images that fit it."""
        return images(self.shape, batch, seed, dtype)

    def num_prefix(self, model: Any) -> int:
        """Prefix tokens, known without vtoken."""
        return int(model.num_prefix_tokens) if self.prefix is None else self.prefix


def _built(host: Host) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # mixed rotary frequencies keep what the constructor draws
        return host.build()


_dino = {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "rope_type": "dinov3", "rope_rotate_half": True}
_eva02 = {"use_rot_pos_emb": True, "ref_feat_shape": (8, 8), "swiglu_mlp": True, "scale_mlp": True}
_rope = {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "attn_type": "rope"}
_part = functools.partial

ALL_HOSTS: list[Host] = [
    Host("vit_token", vit),
    Host("vit_reg", _part(vit, reg_tokens=3)),
    Host("vit_avg", _part(vit, global_pool="avg")),
    Host("vit_avg_prefix", _part(vit, global_pool="avg", class_token=True, reg_tokens=2)),
    Host("vit_avg_with_prefix", _part(vit, global_pool="avg", class_token=True, pool_include_prefix=True)),
    Host("vit_avgmax", _part(vit, global_pool="avgmax", class_token=True)),
    Host("vit_max", _part(vit, global_pool="max")),
    Host("vit_map", _part(vit, global_pool="map", class_token=True, reg_tokens=1)),
    Host("vit_map_with_prefix", _part(vit, global_pool="map", class_token=True, pool_include_prefix=True)),
    Host("vit_prr_token", _part(vit, global_pool="prr", class_token=True)),
    Host("vit_prr_avg", _part(vit, global_pool="prr", class_token=False)),
    Host("vit_nopool", _part(vit, global_pool="", class_token=True)),
    Host("vit_qk_norm", _part(vit, qk_norm=True)),
    Host("vit_layer_scale", _part(vit, init_values=1e-5)),
    Host("vit_scale_norms", _part(vit, scale_attn_norm=True, scale_mlp_norm=True, global_pool="avg")),
    Host("vit_respost", _part(vit, block_fn=ResPostBlock, init_values=1e-5, global_pool="avg")),
    Host("vit_gated", _part(vit, attn_layer=GatedAttention)),
    Host("vit_pre_norm", _part(vit, pre_norm=True, qkv_bias=False)),
    Host("vit_no_embed_class", _part(vit, no_embed_class=True, init_values=1e-5, reg_tokens=2)),
    Host("vit_dynamic", _part(vit, dynamic_img_size=True, global_pool="avg"), (3, 24, 40)),
    Host("vit_rect", _part(vit, img_size=(24, 44)), (3, 24, 44)),
    Host("vit_unfused", lambda: unfused(vit(global_pool="avg"))),
    Host("distilled", distilled),
    Host("hybrid", hybrid),
    Host("vitamin", vitamin, (3, 128, 128)),
    Host("eva", _part(eva, init_values=1e-5)),
    Host("eva02", _part(eva, **_eva02)),
    Host("eva02_token", _part(eva, **_eva02, global_pool="token", qkv_fused=False, scale_attn_inner=True)),
    Host("eva_postnorm", _part(eva, use_post_norm=True, global_pool="token")),
    Host("eva_mixed", _part(eva, **_rope, rope_type="mixed", init_values=1e-5, global_pool="token")),
    Host("eva_mixed_rect", _part(eva, **_rope, rope_type="mixed", img_size=(24, 40)), (3, 24, 40)),
    Host("eva_dinov3", _part(eva, **_dino, num_reg_tokens=4, qkv_bias=False, init_values=1e-5, dynamic_img_size=True)),
    Host("eva_rope", _part(eva, **_rope, qk_norm=True, dynamic_img_size=True), (3, 40, 24)),
    Host("eva_gqa", _part(eva, **_rope, qkv_fused=False, num_kv_heads=2)),
    Host("eva_gated", _part(eva, **_dino, swiglu_mlp=True, swiglu_align_to=8, class_token=False)),
    Host("eva_map", _part(eva, **_rope, global_pool="map")),
    Host("eva_avgmax", _part(eva, **_eva02, global_pool="avgmax")),
    Host("naflex_avg", naflex),
    Host("naflex_reg_avg", _part(naflex, class_token=True, reg_tokens=2, init_values=1e-5)),
    Host("naflex_map", _part(naflex, global_pool="map")),
    Host("naflex_map_with_prefix", _part(naflex, global_pool="map", class_token=True, pool_include_prefix=True)),
    Host("naflex_rope", _part(naflex, rope_type="axial", pos_embed="none", attn_type="rope"), (3, 24, 40)),
    Host("naflex_rope_mixed", _part(naflex, rope_type="mixed", attn_type="eva", class_token=True)),
]
