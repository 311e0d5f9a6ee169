"""Whole models with kernels wherever they can run, against the same models in torch: outputs, gradients, masks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

import vtoken
import vtoken_kernels.attention as attention_module
from tests.helpers import GatedAttention, assert_close, images, randomise_, vit
from tests.methods.sparse_hosts import taught
from vtoken.ops import backend
from vtoken_kernels import select, sparse_attention

SHAPE = (3, 20, 28)
_small = functools.partial(vit, img_size=SHAPE[1:], embed_dim=32, num_heads=2, depth=2)


def open_clip_tower() -> nn.Module:
    transformer = pytest.importorskip("open_clip.transformer")
    return transformer.VisionTransformer(  # type: ignore[no-any-return]
        image_size=SHAPE[1:], patch_size=4, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=8
    )


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "timm": _small,
    "timm respost, norms, gate": functools.partial(
        _small, block_fn=ResPostBlock, qk_norm=True, init_values=1e-5, attn_layer=GatedAttention
    ),
    "open_clip": open_clip_tower,
}


def runs(build: Callable[[], nn.Module], config: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """Output, gradients, and kept pairs per layer of a model in training mode: by torch, and with kernels."""
    found = []
    for forced in ("", "triton"):
        monkeypatch.setattr(backend, "FORCED", forced)
        model = vtoken.apply(randomise_(build(), 0), config)
        if isinstance(config, vtoken.Sparsifiner):
            taught(model)
        with vtoken.tracing(model) as trace:
            out = model.train()(images(SHAPE))
        out.square().sum().backward()
        kept = [] if trace.attention is None else [record.kept for record in trace.attention]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([out.detach(), grads, trace.tokens, kept])
    return found[0], found[1]


def assert_alike(torch_run: list[Any], kernel_run: list[Any]) -> None:
    assert torch_run[2:] == kernel_run[2:]
    assert_close("output", torch_run[0], kernel_run[0], 3e-6)
    assert len(torch_run[1]) == len(kernel_run[1]) > 10
    whole = [torch.cat([g.flatten() for g in run[1]]) for run in (torch_run, kernel_run)]
    assert_close("gradients", *whole, 1e-5)


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    """One entry per call of a launcher."""
    calls, stock = [], getattr(module, name)

    def run(*args: Any) -> Any:
        calls.append(name)
        return stock(*args)

    monkeypatch.setattr(module, name, run)
    return calls


@pytest.mark.parametrize("name", HOSTS)
def test_merging(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, attention_module, "attention")
    assert_alike(*runs(HOSTS[name], vtoken.PiToMe(ratio=0.8), monkeypatch))
    assert len(calls) == 1  # the second block, where tokens have sizes


def test_sizes_reach_blocks_that_merge_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, attention_module, "attention")
    assert_alike(*runs(_small, vtoken.ToMe(r=[5, 0]), monkeypatch))
    assert len(calls) == 1


def test_nothing_merged_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "FORCED", "triton")
    model, x = randomise_(_small(), 0).eval(), images(SHAPE)
    expected = model(x)
    assert torch.equal(vtoken.apply(model, vtoken.PiToMe(ratio=1.0))(x), expected)


def test_a_mask_of_the_callers_is_no_token_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "FORCED", "triton")
    model, x = randomise_(_small(), 0).eval(), images(SHAPE)
    mask = torch.randn(x.shape[0], 1, 1, vtoken.plan(model, vtoken.ToMe(r=0)).tokens[0])
    with torch.no_grad():
        stock = model.forward_features(x, attn_mask=mask)
        vtoken.apply(model, vtoken.ToMe(r=0))
        assert torch.equal(model.forward_features(x, attn_mask=mask), stock)


def test_hooks_and_replaced_projections_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "FORCED", "triton")
    model = vtoken.apply(randomise_(_small(), 0).eval(), vtoken.ToMe(r=5))
    seen: list[Tensor] = []
    model.blocks[1].attn.register_forward_hook(lambda module, args, out: seen.append(out))
    model.blocks[1].attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out))
    model(images(SHAPE))
    assert [tuple(x.shape) for x in seen] == [(2, 31, 96), (2, 31, 32)]


@pytest.mark.parametrize("mode", ["exact", "threshold", "grouped"])
@pytest.mark.parametrize("name", ["timm", "open_clip"])
def test_sparsifiner(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attends = counted(monkeypatch, sparse_attention, "sparse_attention")
    selects = counted(monkeypatch, select, "best_rows" if mode == "grouped" else "block_lists")
    config = vtoken.Sparsifiner(mode=mode, keep_ratio=0.2, query_group=18)
    assert_alike(*runs(HOSTS[name], config, monkeypatch))
    assert len(attends) == len(selects) == 2


def test_sparsifiner_with_sizes_and_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    attends = counted(monkeypatch, sparse_attention, "sparse_attention")
    found = []
    for forced in ("", "triton"):
        monkeypatch.setattr(backend, "FORCED", forced)
        model = randomise_(_small(), 0).eval()
        vtoken.apply(model, [vtoken.Sparsifiner(keep_ratio=0.3), vtoken.ToMe(r=4)])
        found.append(taught(model)(images(SHAPE)).detach())
    assert_close("output", *found, 3e-6)
    assert len(attends) == 2


def test_what_kernels_cannot_do_is_said_or_done_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = functools.partial(_small, embed_dim=16)  # heads of 8
    config = vtoken.Sparsifiner(keep_ratio=0.2, layers=(0,))
    assert_alike(*runs(narrow, config, monkeypatch))
    model = taught(vtoken.apply(randomise_(narrow(), 0), config.replace(backend="triton")))
    with pytest.raises(vtoken.ConfigError, match="heads are 8 wide; kernels take 16 to 128"):
        model(images(SHAPE))
