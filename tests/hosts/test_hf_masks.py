"""Connectivity masks in transformers' towers: attention functions, masks, maps, sizes, holders, refusals.

What the masks compute is compared with plain loops in tests/methods/test_sparsifiner.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtoken
from tests.contract.table import attention, blocks, call, checkpointing_, run, snapshot
from tests.helpers import assert_close, assert_same, images, randomise_
from tests.methods.sparse_hosts import NESTED, TOWERS, against_loops, sparse, taught
from vtoken.methods.sparsifiner.settings import SparseAttention

hf = pytest.importorskip("transformers")
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

CONFIG = vtoken.Sparsifiner(keep_ratio=0.4)
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4,
    "image_size": 20,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
PLAIN = [name for name in TOWERS if name.startswith("hf_")]
x = images((3, 20, 20))


def clip() -> Any:
    config = hf.CLIPConfig(vision_config=SIZES, text_config=TEXT, projection_dim=8)
    return randomise_(hf.CLIPModel(config), 0).eval()


def siglip2() -> Any:
    config = {n: v for n, v in SIZES.items() if n != "image_size"} | {"num_patches": 25}
    return randomise_(hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**config)), 0).eval()


@pytest.mark.parametrize("name", PLAIN)
def test_attention_functions_that_a_model_is_set_to(name: str) -> None:
    """All keys kept: bit for bit what that function gives. Masks: the same whatever it is."""
    masked = []
    for kind in ("eager", "sdpa"):
        model = TOWERS[name].model()
        model.set_attn_implementation(kind)
        stock = run(model, x)
        sparse(model, keep_ratio=1.0)
        assert_same(kind, stock, run(model, x))
        vtoken.configure(model, keep_ratio=0.4)
        masked.append(run(model, x))
        assert not torch.allclose(stock, masked[-1], atol=1e-4)
        assert {layer.config._attn_implementation for layer in map(attention, blocks(model))} == {kind}
    assert_close("eager and sdpa", *masked, 1e-5)


def test_no_attention_function_of_transformers_runs_where_masks_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, called = TOWERS["hf_vit"].model(), []
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def noted(module: Any, *args: Any, **options: Any) -> Any:
        called.append(module)
        return stock(module, *args, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", noted)
    sparse(model, keep_ratio=0.4, layers=(1,))
    run(model, x)
    assert [hasattr(m, "predictor") for m in called] == [False, False]


@pytest.mark.parametrize("name", PLAIN)
def test_parameters_and_exact_removal(name: str) -> None:
    model = TOWERS[name].model()
    stock, before, keys = run(model, x), snapshot(model), list(model.state_dict())
    sparse(model, CONFIG)
    added = [k for k in model.state_dict() if k not in keys]
    assert [k for k in model.state_dict() if k in keys] == keys
    tokens = TOWERS[name].shape[1] ** 2 // 16 + vtoken.core.host.host_of(model).spec.num_prefix
    for layer in blocks(model):
        part = attention(layer).predictor
        assert {n: tuple(p.shape) for n, p in part.state_dict().items()} == {
            "reduce_q.weight": (4, 8), "reduce_q.bias": (4,), "reduce_k.weight": (4, 8), "reduce_k.bias": (4,),
            "w_down": (tokens, tokens // 6), "w_up": (tokens, tokens // 6), "threshold": (2,),
        }  # fmt: skip
    assert len(added) == 7 * 3
    assert all(".predictor." in k for k in added)
    run(model, x)
    vtoken.remove(model)
    assert snapshot(model) == before
    assert_same("after removal", stock, run(model, x))


def test_a_clip_keeps_its_text_and_hands_its_masks_on() -> None:
    model, ids = clip(), torch.tensor([[0, 2, 3, 1], [0, 4, 5, 1]])
    with torch.no_grad():
        stock = model(input_ids=ids, pixel_values=x)
        tower = taught(vtoken.apply(copy.deepcopy(model.vision_model), CONFIG))
        taught(vtoken.apply(model, CONFIG))
        out = model(input_ids=ids, pixel_values=x)
        assert all(k.startswith("vision_model.encoder.layers.") for k in model.state_dict() if "predictor" in k)
        assert_same("text", stock.text_embeds, out.text_embeds)
        assert not torch.allclose(stock.image_embeds, out.image_embeds, atol=1e-3)
        assert_same("the tower by itself", tower(x).last_hidden_state, out.vision_model_output.last_hidden_state)
    with vtoken.tracing(model) as trace, torch.no_grad():
        model.get_image_features(pixel_values=x)
    assert [r.layer for r in trace.attention] == [0, 1, 2]


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("layers", [None, (1,)])
def test_attention_maps_are_true_or_refused(kind: str, layers: tuple[int, ...] | None) -> None:
    model = TOWERS["hf_vit"].model()
    model.set_attn_implementation(kind)
    with torch.no_grad():
        stock = model(x, output_attentions=True).attentions
        sparse(model, keep_ratio=1.0, layers=layers)
        assert_same("all keys kept", stock, model(x, output_attentions=True).attentions)
        assert_same("of the tower", stock, model.vit(x, output_attentions=True).attentions)
        vtoken.configure(model, keep_ratio=0.4)
        with pytest.raises(vtoken.InputError, match=r"output_attentions=True.*vtoken.tracing"):
            model(x, output_attentions=True)
        with pytest.raises(vtoken.InputError, match="output_attentions"):
            model.vit(x, output_attentions=True)
        with vtoken.tracing(model, maps=("attention",)) as trace:
            states = model(x, output_hidden_states=True).hidden_states
    assert [tuple(rows.shape) for rows in states] == [(2, 26, 16)] * 4
    for record in trace.attention:
        assert torch.allclose(record.attention.sum(-1), torch.ones(()))
        assert record.density == pytest.approx(11 / 26)


def dinov2_backbone() -> Any:
    config = hf.Dinov2Config(
        **{n: v for n, v in SIZES.items() if n != "intermediate_size"}, mlp_ratio=2, out_features=["stage3"],
        attn_implementation="eager",
    )  # fmt: skip
    return randomise_(hf.Dinov2Backbone(config), 0).eval()


@pytest.mark.skipif(not NESTED, reason="one module holds all of DINOv2's attention in this release")
def test_an_attention_in_an_attention_is_refused() -> None:
    model = dinov2_backbone()
    with pytest.raises(vtoken.UnsupportedModelError, match="in this release of transformers its Dinov2Attention holds"):
        vtoken.apply(model, CONFIG)
    assert not vtoken.is_applied(model)


@pytest.mark.skipif(NESTED, reason="masks are refused in this release")
def test_maps_of_a_backbone_are_refused_too() -> None:
    model = dinov2_backbone()
    stock = run(model, x)
    sparse(model, keep_ratio=1.0)
    assert_same("all keys kept", stock, run(model, x))
    vtoken.configure(model, keep_ratio=0.4)
    assert run(model, x).shape == stock.shape
    with pytest.raises(vtoken.InputError, match="output_attentions"):
        model(x, output_attentions=True)


@pytest.mark.skipif(NESTED, reason="masks are refused in this release")
def test_maps_of_a_backbone_have_no_value_for_dropped_patches() -> None:
    options = {n: v for n, v in SIZES.items() if n != "intermediate_size"} | {"mlp_ratio": 2}
    model = randomise_(hf.Dinov2Backbone(hf.Dinov2Config(**options, out_features=["stage1", "stage3"])), 0).eval()
    sparse(model, keep_ratio=1.0, token_keep_ratio=0.5, prune_after=(1,))
    with pytest.raises(vtoken.ShapeError, match="pruned, not merged"):
        run(model, x)
    vtoken.configure(model, prune_after=(0,), token_keep_ratio=1.0)
    assert all(map.isfinite().all() for map in model(x).feature_maps)


@pytest.mark.parametrize("name", [n for n in PLAIN if n not in ("hf_deit", "hf_dino")])
@pytest.mark.parametrize("grid", [(5, 5), (4, 6)])
def test_other_image_sizes(name: str, grid: tuple[int, int]) -> None:
    model = sparse(TOWERS[name].model(dtype=torch.float64), CONFIG)
    prefix = vtoken.core.host.host_of(model).spec.num_prefix
    against_loops(model, images((3, 4 * grid[0], 4 * grid[1]), dtype=torch.float64), grid, prefix)


def test_pruning_without_a_class_token_is_refused() -> None:
    model = TOWERS["hf_siglip"].model()
    with pytest.raises(vtoken.ConfigError, match="class token's attention, SiglipVisionModel has none"):
        vtoken.apply(model, vtoken.Sparsifiner(token_keep_ratio=0.5, prune_after=(1,)))
    assert not vtoken.is_applied(model)


def _rows(side: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, side[0] * side[1], 48, generator=torch.Generator().manual_seed(0))


def test_padded_patches_and_grids_that_differ_are_refused() -> None:
    model, shapes = siglip2(), torch.tensor([[5, 5], [5, 5]])
    rows, ones = _rows((5, 5)), torch.ones(2, 25, dtype=torch.int64)
    sparse(model, CONFIG)
    with torch.no_grad():
        out = model(rows, pixel_attention_mask=None, spatial_shapes=shapes).pooler_output
        told = model(rows, pixel_attention_mask=ones, spatial_shapes=shapes).pooler_output
        assert_same("a mask that marks no padding", out, told)
        padded = ones.clone()
        padded[0, 20:] = 0
        with pytest.raises(vtoken.InputError, match=r"padded rows.*connectivity masks"):
            model(rows, pixel_attention_mask=padded, spatial_shapes=torch.tensor([[4, 5], [5, 5]]))
        with pytest.raises(vtoken.InputError, match="one patch grid"):
            model(_rows((4, 6)), pixel_attention_mask=None, spatial_shapes=torch.tensor([[4, 6], [6, 4]]))
        vtoken.configure(model, keep_ratio=1.0)
        given = {"pixel_attention_mask": padded, "spatial_shapes": torch.tensor([[4, 5], [5, 5]])}
        assert_same("all keys kept", siglip2()(rows, **given).pooler_output, model(rows, **given).pooler_output)


@pytest.mark.parametrize("name", ["hf_vit", "hf_clip", "hf_siglip"])
def test_masks_of_the_caller(name: str) -> None:
    """As true and false, as numbers of -inf and as the least finite number: those keys get nothing, from anybody."""
    attn = attention(blocks(sparse(TOWERS[name].model(dtype=torch.float64), CONFIG))[0])
    rows = torch.randn(2, attn.predictor.num_tokens, 16, dtype=torch.float64)
    seen = torch.rand(2, 1, rows.shape[1], rows.shape[1], generator=torch.Generator().manual_seed(0)) > 0.5
    seen[:, :, 3] = False
    with torch.no_grad():
        plain = attn(rows)[0]
        found = attn(rows, attention_mask=seen)[0]
        for least in (-torch.inf, torch.finfo(torch.float64).min):
            numbers = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, least)
            assert_close(f"{least}", found, attn(rows, attention_mask=numbers)[0], 1e-12)
        output = getattr(attn, "out_proj", getattr(attn, "o_proj", None))
        assert output is not None
        assert_close("a query without keys", output.bias.expand(2, -1), found[:, 3], 1e-12)
        assert not torch.allclose(plain, found)
        per_key = torch.randn(2, 1, 1, rows.shape[1], dtype=torch.float64)
        whole = per_key.expand(-1, -1, rows.shape[1], -1)
        assert_close("one row for all", attn(rows, attention_mask=whole.clone())[0],
                     attn(rows, attention_mask=whole)[0], 1e-12)  # fmt: skip


@pytest.mark.parametrize("name", ["hf_vit", "hf_clip", "hf_siglip"])
def test_sizes_of_merged_tokens_are_one_number_a_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels serve no other mask."""
    model, seen = sparse(TOWERS[name].model(), [vtoken.ToMe(r=4), CONFIG]), []
    stock = SparseAttention.attend

    def noted(self: Any, q: Tensor, k: Tensor, v: Tensor, predictor: Any, told: Any) -> Tensor:
        seen.append(None if told.mask is None else tuple(told.mask.shape))
        return stock(self, q, k, v, predictor, told)

    monkeypatch.setattr(SparseAttention, "attend", noted)
    run(model, x)
    tokens = vtoken.plan(model).tokens
    assert seen == [None, (2, 1, 1, tokens[1]), (2, 1, 1, tokens[2])]


@pytest.mark.parametrize("name", [n for n in PLAIN if n not in ("hf_deit", "hf_dino", "hf_dinov3")])
@pytest.mark.parametrize("mode", ["exact", "grouped", "threshold"])
def test_checkpointed_gradients_with_two_forwards_before_one_backward(name: str, mode: str) -> None:
    model = sparse(TOWERS[name].model(dtype=torch.float64), keep_ratio=0.4, mode=mode, query_group=5).train()
    inputs, grads = [x.double(), images((3, 20, 20), 3, 1, torch.float64)], []
    for checkpointed in (False, True):
        if checkpointed:
            checkpointing_(model)
        model.zero_grad()
        first, second = (call(model, given) for given in inputs)
        (first.square().sum() + second.pow(3).sum()).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert not any("predictor" in n for n in grads[0])
    assert sum(".q_proj." in n for n in grads[0]) == 6
    for n, g in grads[0].items():
        if float(g.abs().max()) > 1e-9:
            assert_close(n, g, grads[1][n], 1e-10)


class _Doubled(hf.models.vit.modeling_vit.ViTAttention):
    """A user's attention with a forward of its own, which masks would bypass."""

    def forward(self, *args: Any, **options: Any) -> Any:
        out, weights = super().forward(*args, **options)
        return 2 * out, weights


class _Nested(nn.Module):
    """The attention of older releases: it holds the one that projects."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.key = nn.Linear(16, 16)


def test_other_attentions_are_refused_by_name() -> None:
    model = TOWERS["hf_vit"].model()
    model.vit.layers[1].attention.__class__ = _Doubled
    before = snapshot(model)
    with pytest.raises(vtoken.UnsupportedModelError, match=r"block 1 is a .*_Doubled; supported: .*ViTAttention"):
        vtoken.apply(model, CONFIG)
    assert snapshot(model) == before
    stock = run(model, x)
    sparse(model, keep_ratio=0.4, layers=(0, 2))
    assert not torch.equal(stock, run(model, x))
    vtoken.remove(model)
    model.vit.layers[2].attention = _Nested()
    before = snapshot(model)
    with pytest.raises(vtoken.UnsupportedModelError, match=r"its _Nested holds another attention.*q_proj"):
        vtoken.apply(model, CONFIG)
    assert snapshot(model) == before
