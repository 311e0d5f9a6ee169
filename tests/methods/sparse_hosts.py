"""Small models for the tests of attention methods, with predictors whose every part matters."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

import vtoken
from tests.contract.table import attention, call
from tests.helpers import GatedAttention, Host, assert_close, distilled, eva, vit
from tests.methods.slow_sparsifiner import Case, run_slowly
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
_eva = functools.partial(eva, **_SMALL, class_token=True, global_pool="token")
_ROTARY: dict[str, Any] = {"use_rot_pos_emb": True, "use_abs_pos_emb": False}
_SQUARE: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4, "image_size": 20,
}  # fmt: skip
_PLAIN = _SQUARE | {"intermediate_size": 32, "num_labels": 10}


def _transformers(model: str, config: str, **options: Any) -> nn.Module:
    hf = pytest.importorskip("transformers")
    return getattr(hf, model)(getattr(hf, config)(**options))  # type: ignore[no-any-return]


def _nested() -> bool:
    """Whether DINOv2's attention holds another in this release of transformers: masks are refused there."""
    try:
        from transformers.models.dinov2 import modeling_dinov2
    except ImportError:
        return False
    return hasattr(modeling_dinov2, "Dinov2SelfAttention")


NESTED = _nested()
_TOWERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "eva": (functools.partial(_eva, **_ROTARY, swiglu_mlp=True, init_values=1e-5), GRID),
    "eva separate": (functools.partial(_eva, use_rot_pos_emb=True, qkv_fused=False, scale_attn_inner=True), GRID),
    "rope": (
        functools.partial(_eva, **_ROTARY, attn_type="rope", rope_type="mixed", qk_norm=True, num_reg_tokens=2), GRID
    ),
    "rope half": (
        functools.partial(
            _eva, **_ROTARY, attn_type="rope", rope_type="dinov3", rope_rotate_half=True, qkv_fused=False,
            num_kv_heads=1,
        ),
        GRID,
    ),
    "hf_vit": (functools.partial(_transformers, "ViTForImageClassification", "ViTConfig", **_PLAIN), (5, 5)),
    "hf_deit": (functools.partial(_transformers, "DeiTModel", "DeiTConfig", **_PLAIN), (5, 5)),
    "hf_clip": (functools.partial(_transformers, "CLIPVisionModel", "CLIPVisionConfig", **_PLAIN), (5, 5)),
    "hf_siglip": (functools.partial(_transformers, "SiglipVisionModel", "SiglipVisionConfig", **_PLAIN), (5, 5)),
    "hf_dino": (
        functools.partial(
            _transformers, "Dinov2ForImageClassification", "Dinov2Config", **_SQUARE, mlp_ratio=2, num_labels=10,
            attn_implementation="eager",
        ),
        (5, 5),
    ),
    "hf_dino_reg": (
        functools.partial(
            _transformers, "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **_SQUARE, mlp_ratio=2,
        ),
        (5, 5),
    ),
    "hf_dinov3": (
        functools.partial(
            _transformers, "DINOv3ViTModel", "DINOv3ViTConfig", **_PLAIN, num_register_tokens=2, layerscale_value=1.0,
        ),
        (5, 5),
    ),
}  # fmt: skip
#: The towers of transformers, and those of timm that rotate queries and keys.
TOWERS = {
    n: Host(n, build, (3, *(4 * side for side in grid))) for n, (build, grid) in _TOWERS.items()
    if not (NESTED and n in ("hf_dino", "hf_dino_reg"))
}  # fmt: skip


def grid_of(host: Host) -> tuple[int, int]:
    """Patch rows and columns of its images."""
    return host.shape[1] // 4, host.shape[2] // 4


def tables(model: Any, x: Tensor) -> list[tuple[Tensor, Tensor]] | None:
    """Sines and cosines by which every block is told to rotate queries and keys; None if it is told of none."""
    told: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        if kwargs.get("rope") is not None:
            told.append(kwargs["rope"].chunk(2, dim=-1))
        if kwargs.get("position_embeddings") is not None:
            told.append(kwargs["position_embeddings"][::-1])

    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks(model)]
    with torch.no_grad():
        call(model, x)
    for handle in handles:
        handle.remove()
    return told or None


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
        call(model, x)
    for handle in handles:
        handle.remove()
    if not getattr(attention(first), "batch_first", True):
        seen = [rows.transpose(0, 1) for rows in seen]
    return seen[0], seen[1], trace


def against_loops(model: Any, x: Tensor, grid: tuple[int, int], prefix: int) -> None:
    """The patched model is the slow one whose predictors were resized by hand."""
    embedded, rows, trace = block_rows(model, x)
    assert trace.grid == grid
    slow = copy.deepcopy(model)
    for block in blocks(slow):
        p = attention(block).predictor
        for name, factor in (("w_down", p.grid[0] * p.grid[1] / (grid[0] * grid[1])), ("w_up", 1.0)):
            w = getattr(p, name).detach()
            maps = w[prefix:].T.reshape(1, -1, *p.grid)
            maps = torch.nn.functional.interpolate(maps, grid, mode="bicubic") * factor
            setattr(p, name, torch.nn.Parameter(torch.cat([w[:prefix], maps[0].flatten(1).T])))
    with torch.no_grad():
        expected = run_slowly(blocks(slow), embedded, Case(prefix, grid, keep=0.4, tables=tables(model, x)))
    for b, each in enumerate(expected):
        for found, layer in zip(trace.attention, each.layers, strict=True):
            assert torch.equal(found.mask[b], layer.mask)
        assert_close("rows", each.x, rows[b], 1e-9)
