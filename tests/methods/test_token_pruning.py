"""Token pruning by the class token's attention: counts, choice, what is left of maps, and where it is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import vtoken
from tests.contract.table import features, run, traced
from tests.helpers import assert_close, assert_same, images, randomise_, vit
from tests.methods.sparse_hosts import HOSTS, sparse
from vtoken.core.slots import AttentionCall, Slot
from vtoken.methods.sparsifiner.predictor import ConnectivityPredictor
from vtoken.methods.sparsifiner.pruning import TokenPruning


@pytest.mark.parametrize("ratio", [0.9, 0.7, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("patches", [1, 24, 100, 196])
def test_counts(ratio: float, patches: int) -> None:
    """ceil(r ** j * T) of the original T, at least one."""
    method = TokenPruning(ratio, (6, 3, 9))
    left, expected = patches, []
    for layer in range(12):
        removed = method.num_removed(layer, left, patches)
        assert removed == 0 or layer in (3, 6, 9)
        left -= removed
        expected.append(left)
    steps = [max(1, math.ceil(round(patches * ratio**j, 9))) for j in (1, 2, 3)]
    assert [expected[i] for i in (3, 6, 9)] == steps


def test_published_counts() -> None:
    """DeiT-S with r = 0.7 after blocks 3, 6, 9: 196, 138, 97, 68 patches."""
    model = vit(img_size=224, patch_size=16, depth=12)
    plan = vtoken.plan(model, vtoken.Sparsifiner(token_keep_ratio=0.7))
    assert [n - 1 for n in plan.tokens] == [196] * 4 + [138] * 3 + [97] * 3 + [68] * 3


def test_kept_rows_stay_in_order_and_ties_go_to_the_first() -> None:
    x = torch.arange(2 * 8 * 3, dtype=torch.float32).view(2, 8, 3)
    rank = torch.tensor([[9.0, 9, 1, 5, 5, 5, 0, 5], [0.0, 0, 1, 2, 3, 4, 5, 6]]).unsqueeze(-1)
    out, slot = TokenPruning(0.5, (0,)).on_block(0, x, rank, Slot(embedded=8, track_anchor=True, track_dest=True), 2)
    assert slot.anchor.tolist() == [[0, 1, 3, 4, 5], [0, 1, 5, 6, 7]]
    assert torch.equal(out, torch.stack([x[0, slot.anchor[0]], x[1, slot.anchor[1]]]))
    assert slot.dest.tolist() == [[0, 1, -1, 2, 3, 4, -1, -1], [0, 1, -1, -1, -1, 2, 3, 4]]
    assert slot.dropped
    again, later = TokenPruning(0.2, (0,)).on_block(0, out, rank[:, :5], slot, 2)
    assert again.shape == (2, 4, 3)  # ceil(0.2 * 6)
    assert later.anchor.tolist() == [[0, 1, 4, 5], [0, 1, 6, 7]]
    assert later.dest.tolist() == [[0, 1, -1, -1, 2, 3, -1, -1], [0, 1, -1, -1, -1, -1, 2, 3]]


def pruned(name: str = "registers", **options: Any) -> Any:
    settings: dict[str, Any] = {"keep_ratio": 0.5, "token_keep_ratio": 0.6, "prune_after": (0, 2)} | options
    return sparse(HOSTS[name].model(), **settings)


def test_trace_tells_which_patches_are_left() -> None:
    model, x = pruned(), HOSTS["registers"].images()
    rows, trace = features(model, x)
    assert trace.tokens == [27, 18, 18, 12] == list(vtoken.plan(model).tokens)
    assert rows.shape[1] == 12
    assert trace.dropped
    for b in range(2):
        kept, earlier = trace.kept(b), trace.kept(b, layer=0)
        assert len(kept) == 9
        assert len(earlier) == 15
        assert set(kept.tolist()) < set(earlier.tolist())
        assert bool((kept.diff() > 0).all())
        assert (trace.dest[b, 3:] >= 0).nonzero().flatten().tolist() == kept.tolist()
    assert torch.equal(trace.size, torch.ones(2, 12))


def test_no_dense_map_of_pruned_patches() -> None:
    model, x = pruned(), HOSTS["registers"].images()
    with pytest.raises(vtoken.ShapeError, match="pruned"):
        model.forward_intermediates(x)
    rows = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    assert [r.shape[1] for r in rows] == [15, 15, 9]
    out, trace = features(model, x)
    with pytest.raises(vtoken.ShapeError, match="pruned"):
        vtoken.unmerge(out, trace)
    tower = pruned("open_clip")
    with pytest.raises(vtoken.ShapeError, match="pruned"):
        tower.forward_intermediates(HOSTS["open_clip"].images())


@pytest.mark.parametrize("pool", ["avg", "map", "max", "token"])
def test_poolings_see_the_rows_that_are_left(pool: str) -> None:
    model = randomise_(vit(img_size=(16, 24), embed_dim=16, num_heads=2, class_token=True, global_pool=pool), 0).eval()
    sparse(model, keep_ratio=0.5, token_keep_ratio=0.6, prune_after=(0, 2))
    x = images((3, 16, 24))
    with torch.no_grad():
        rows = model.forward_features(x)
        assert rows.shape[1] == 10
        expected = {"token": lambda: rows[:, 0], "avg": lambda: rows[:, 1:].mean(1), "max": lambda: rows[:, 1:].amax(1),
                    "map": lambda: model.attn_pool(rows[:, 1:])}[pool]()  # fmt: skip
        assert_close("logits", model.head(model.fc_norm(expected)), model(x), 1e-5)
        assert_close("by the head", model(x), model.forward_head(rows), 1e-5)


@pytest.mark.parametrize("options", [{"global_pool": "avg"}, {"global_pool": "avg", "reg_tokens": 2}])
def test_a_class_token_is_needed(options: dict[str, Any]) -> None:
    """Registers alone do not do."""
    model = randomise_(vit(**options), 0).eval()
    config = vtoken.Sparsifiner(token_keep_ratio=0.5, prune_after=(1,))
    with pytest.raises(vtoken.ConfigError, match="class token"):
        vtoken.apply(model, config)
    assert not vtoken.is_applied(model)
    vtoken.apply(model, config.replace(token_keep_ratio=1.0))
    out = run(model, images((3, 32, 32)))
    with pytest.raises(vtoken.ConfigError, match="class token"):
        vtoken.configure(model, token_keep_ratio=0.5)
    assert_same("after the refusal", out, run(model, images((3, 32, 32))))


def test_two_methods_between_the_blocks_are_refused() -> None:
    model = HOSTS["cls"].model()
    config = vtoken.Sparsifiner(token_keep_ratio=0.5, prune_after=(1,))
    with pytest.raises(vtoken.ConfigError, match="two methods act at one place, as BlockMethod: pitome, sparsifiner"):
        vtoken.apply(model, [vtoken.PiToMe(), config])
    with pytest.raises(vtoken.ConfigError, match="two methods act at one place, as AttentionMethod"):
        vtoken.apply(model, [vtoken.Sparsifiner(), vtoken.Sparsifiner()])
    assert not vtoken.is_applied(model)


def test_pruning_can_be_switched_on_and_off() -> None:
    model, x = pruned(token_keep_ratio=1.0), HOSTS["registers"].images()
    whole = run(model, x)
    vtoken.configure(model, token_keep_ratio=0.6)
    assert traced(model, x)[1].tokens == [27, 18, 18, 12]
    assert_same("as when applied so", run(pruned(), x), run(model, x))
    vtoken.configure(model, prune_after=(1,))
    assert traced(model, x)[1].tokens == [27, 27, 18, 18]
    vtoken.configure(model, token_keep_ratio=1.0)
    assert_same("off again", whole, run(model, x))


def test_masks_of_the_caller_are_refused_where_tokens_are_gone() -> None:
    model, x = pruned(), HOSTS["registers"].images()
    for options in ({"attn_mask": torch.zeros(27, 27)}, {"is_causal": True}):
        with pytest.raises(vtoken.InputError, match="removed"):
            model(x, **options)


def test_the_class_row_is_only_computed_where_tokens_go(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    module, calls = importlib.import_module("vtoken.methods.sparsifiner.settings"), []
    first = module._first_row
    monkeypatch.setattr(module, "_first_row", lambda q, k, call: calls.append(call.layer) or first(q, k, call))
    run(pruned(), HOSTS["registers"].images())
    assert calls == [0, 2]


@pytest.mark.parametrize("shape", [(9, 9), (2, 1, 1, 9), (2, 3, 9, 9)])
def test_the_class_row_obeys_the_mask_of_its_call(shape: tuple[int, ...]) -> None:
    method, rng = vtoken.Sparsifiner(keep_ratio=1.0).build(1)[0], torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 9, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(shape, generator=rng, dtype=torch.float64)
    for mask in (bias, bias > -0.5):
        call = AttentionCall(0, 1, Slot(embedded=9), (2, 4), 0.5, mask, wants_cls=True)
        method.attend(q, k, k, _predictor(), call)
        logits = q @ k.transpose(-1, -2) * 0.5
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        assert_close("class row", logits.softmax(-1)[:, :, 0], call.cls, 1e-12)


def _predictor() -> ConnectivityPredictor:
    return ConnectivityPredictor(4, 3, grid=(2, 4))
