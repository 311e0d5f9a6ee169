"""Sparsifiner in whole models, against the slow model of slow_sparsifiner.py, and its properties."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
from tests.contract.slow_model import Settings
from tests.contract.table import call, run
from tests.helpers import assert_close, assert_same, images, randomise_, vit
from tests.methods.slow_sparsifiner import Case, run_slowly
from tests.methods.sparse_hosts import GRID, HOSTS, TOWERS, block_rows, blocks, grid_of, sparse, tables
from tests.ops.test_connections import Sizes
from vtoken.core.method import AttentionMethod
from vtoken.core.records import AttentionRecord

F64 = torch.float64
ALL = HOSTS | TOWERS
each_host = pytest.mark.parametrize("name", HOSTS)
each_tower = pytest.mark.parametrize("name", ALL)
# Few coefficients over a thin basis: many scores are exactly 0, so that ties decide.
_TIES: dict[str, Any] = {"coef_topk": 2, "basis_threshold": 0.1, "num_basis": 5}
_WORDS = {"keep_ratio": "keep", "query_group": "group", "token_keep_ratio": "token_keep"}


def check(name: str, merging: tuple[vtoken.MethodConfig, Settings] | None = None, **options: Any) -> vtoken.Trace:
    """Rows behind the last block, live tokens, masks, scores and attention of every layer are those of the loops."""
    model, x = ALL[name].model(dtype=F64), ALL[name].images(dtype=F64)
    stock = copy.deepcopy(model)
    config: Any = vtoken.Sparsifiner(**options)
    sparse(model, config if merging is None else [merging[0], config])
    embedded, rows, trace = block_rows(model, x)
    words = {_WORDS.get(k, k): v for k, v in options.items() if k not in ("num_basis", "share_proj", "backend")}
    prefix = trace.num_prefix
    merged = None if merging is None else merging[1]
    case = Case(prefix, grid_of(ALL[name]), merging=merged, tables=tables(stock, x), **words)
    with torch.no_grad():
        slow = run_slowly(blocks(model), embedded, case)
    for b, expected in enumerate(slow):
        assert_close("rows", expected.x, rows[b], 1e-9)
        assert trace.anchor is not None
        assert trace.anchor[b].tolist() == sorted(expected.live)
    for found in trace.attention:
        for b, expected in enumerate(slow):
            layer = expected.layers[found.layer]
            assert torch.equal(found.mask[b], layer.mask), f"mask of image {b}, block {found.layer}"
            assert_close("attention", layer.attention, found.attention[b], 1e-9)
            if layer.scores is not None:
                assert_close("scores", layer.scores, found.scores[b], 1e-9)
        masks = torch.stack([s.layers[found.layer].mask for s in slow])
        assert found.kept == int(masks.sum())
        assert found.density == pytest.approx(float(masks[:, :, prefix:].double().mean()))
    # What a forward gives does not depend on whether anybody looks on.
    with torch.no_grad():
        seen = call(stock, x)
        with vtoken.tracing(model):
            looked_at = call(model, x)
        assert_close("untraced", looked_at, call(model, x), 1e-9)
    if config.phase == "sparse" and config.keep_ratio != 1.0:
        assert not torch.allclose(seen, run(model, x), atol=1e-4), "the masks were to matter"
    return trace


@each_tower
def test_exact(name: str) -> None:
    trace = check(name, keep_ratio=0.3)
    assert [r.layer for r in trace.attention] == [0, 1, 2]


@each_tower
def test_exact_with_ties(name: str) -> None:
    check(name, keep_ratio=0.5, **_TIES)


@each_tower
def test_grouped(name: str) -> None:
    check(name, keep_ratio=0.3, mode="grouped", query_group=7)  # 24 patches: four groups of six


@pytest.mark.parametrize("group", [5, 24, 64])
def test_grouped_sizes(group: int) -> None:
    check("registers", keep_ratio=0.2, mode="grouped", query_group=group, **_TIES)


@each_tower
def test_threshold(name: str) -> None:
    trace = check(name, mode="threshold")
    rows = trace.attention[0].mask[:, :, trace.num_prefix :].sum(-1)
    assert len(rows.unique()) > 3, "rows were to keep different numbers of keys"


def test_threshold_leaves_rows_without_any_key() -> None:
    trace = check("cls", mode="threshold", **_TIES | {"basis_threshold": 0.22})
    empty = ~trace.attention[0].mask.any(-1)
    assert bool(empty.any())
    assert not bool(empty[:, :, 0].any())
    assert bool((trace.attention[0].attention[empty] == 0).all())


@each_host
@pytest.mark.parametrize("layers", [(1,), (0, -1)])
def test_chosen_layers(name: str, layers: tuple[int, ...]) -> None:
    model, x = HOSTS[name].model(dtype=F64), HOSTS[name].images(dtype=F64)
    sparse(model, keep_ratio=0.3, layers=layers)
    embedded, rows, trace = block_rows(model, x)
    chosen = tuple(n % 3 for n in layers)
    assert tuple(r.layer for r in trace.attention) == chosen
    with torch.no_grad():
        slow = run_slowly(blocks(model), embedded, Case(trace.num_prefix, GRID, layers=chosen))
    assert_close("rows", torch.stack([s.x for s in slow]), rows, 1e-9)
    assert [("predictor" in dict(b.attn.named_children())) for b in blocks(model)] == [i in chosen for i in range(3)]


def test_a_ratio_per_layer() -> None:
    trace = check("registers", keep_ratio=(0.2, 1.0, 0.6))
    assert [int(r.mask[0, 0, -1].sum()) for r in trace.attention] == [6, 27, 17]  # ceil of 5.4, 27, 16.2


@pytest.mark.parametrize(
    "options",
    [{"basis_abs": False}, {"scale": 1.3}, {"coef_topk": 3}, {"share_proj": True}, {"num_basis": 2}, {"coef_topk": 99},
     {"basis_threshold": 0.0}, {"basis_threshold": 9.0}, {"coef_topk": 0}, {"coef_topk": 0, "coef_threshold": 0.3}],
)  # fmt: skip
def test_settings_of_the_predictor(options: dict[str, Any]) -> None:
    check("registers", keep_ratio=0.4, mode="grouped", query_group=2, **options)


@pytest.mark.parametrize("backend", ["dense_masked", "masked", "sparse", "grouped"])
def test_backends(backend: str) -> None:
    modes = {"grouped": ("grouped",), "sparse": ("exact", "threshold")}.get(backend, ("exact", "threshold", "grouped"))
    for mode in modes:
        check("registers", keep_ratio=0.3, backend=backend, mode=mode, query_group=6)


@each_tower
@pytest.mark.parametrize("mode", ["exact", "grouped", "threshold"])
def test_token_pruning_with_masks(name: str, mode: str) -> None:
    if name in ("no prefix", "hf_siglip"):
        pytest.skip("has no class token to rank by")
    options: dict[str, Any] = {"keep_ratio": 0.6, "token_keep_ratio": 0.7, "prune_after": (0, 1)}
    trace = check(name, mode=mode, query_group=5, **options)
    prefix = trace.num_prefix
    rows, columns = grid_of(ALL[name])
    whole, left = rows * columns, {24: (17, 12), 25: (18, 13)}[rows * columns]  # ceil of 16.8 and 11.76; 17.5, 12.25
    assert trace.tokens == [whole + prefix, left[0] + prefix, left[1] + prefix, left[1] + prefix]
    if mode == "exact":  # budgets go by the original number of tokens, at most the live ones
        original = -(-6 * (whole + prefix) // 10)
        kept = [int(r.mask[0, 0, -1].sum()) for r in trace.attention]
        assert kept == [min(original, n) for n in trace.tokens[:-1]]
        assert kept[2] == trace.tokens[2], "the last budget was to be all live tokens"
    first, second = (a[:, prefix:].tolist() for a in trace.layer_anchor[:2])
    assert first[0] != first[1], "the images were to lose different tokens"
    assert all(set(b) < set(a) for a, b in zip(first, second, strict=True)), "pruned tokens never return"


def test_token_pruning_with_dense_attention() -> None:
    check("cls", keep_ratio=1.0, token_keep_ratio=0.5, prune_after=(1,))
    check("open_clip", keep_ratio=1.0, token_keep_ratio=0.5, prune_after=(0, 2))


@each_tower
def test_reconstruction_phase(name: str) -> None:
    host = ALL[name]
    stock = run(host.model(dtype=F64), host.images(dtype=F64))
    trace = _recon(name)
    assert all(r.density == 1.0 and bool(r.mask.all()) for r in trace.attention)
    pruned = {} if name == "hf_siglip" else {"token_keep_ratio": 0.5, "prune_after": (0,)}
    model = sparse(host.model(dtype=F64), phase="recon", **pruned)
    assert_same("outputs are the teacher's, also if tokens are pruned later", stock, run(model, host.images(dtype=F64)))


def _recon(name: str) -> vtoken.Trace:
    model, x = ALL[name].model(dtype=F64), ALL[name].images(dtype=F64)
    sparse(model, phase="recon")
    embedded, rows, trace = block_rows(model, x)
    case = Case(trace.num_prefix, grid_of(ALL[name]), recon=True, tables=tables(model, x))
    with torch.no_grad():
        slow = run_slowly(blocks(model), embedded, case)
    assert_close("rows", torch.stack([s.x for s in slow]), rows, 1e-9)
    for found in trace.attention:
        for b, expected in enumerate(slow):
            layer = expected.layers[found.layer]
            assert_close("attention", layer.attention, found.attention[b], 1e-9)
            assert_close("scores", layer.scores, found.scores[b], 1e-9)
    assert bool((trace.attention[0].scores < 0).any()), "the raw basis is signed"
    return trace


@pytest.mark.parametrize("name", ["cls", "registers", "no prefix", "open_clip", "open_clip rows first"])
@pytest.mark.parametrize("method", ["pitome", "tome"])
@pytest.mark.parametrize("mode", ["exact", "grouped", "threshold"])
def test_together_with_merging(name: str, method: str, mode: str) -> None:
    """Sizes are a bias on the keys; predictors see the live tokens as the places that these stand at."""
    config = {"pitome": vtoken.PiToMe, "tome": vtoken.ToMe}[method](ratio=0.75)
    trace = check(name, (config, Settings(method=method)), keep_ratio=0.4, mode=mode, query_group=4)
    assert trace.tokens[-1] < trace.tokens[1] < trace.tokens[0]
    assert trace.size is not None
    assert float(trace.size.max()) > 1


@pytest.mark.parametrize("name", TOWERS)
def test_towers_together_with_merging(name: str) -> None:
    """What merges is chosen by keys that are not rotated yet; the masks by those that are."""
    trace = check(name, (vtoken.PiToMe(ratio=0.75), Settings(method="pitome")), keep_ratio=0.4)
    assert trace.tokens[-1] < trace.tokens[0]


def test_the_order_of_composed_settings_does_not_matter() -> None:
    outs = []
    for order in (1, -1):
        model = HOSTS["cls"].model()
        settings = [vtoken.PiToMe(ratio=0.75), vtoken.Sparsifiner(keep_ratio=0.4)][::order]
        sparse(model, settings)
        assert vtoken.config_of(model) == tuple(settings)
        outs.append(run(model, HOSTS["cls"].images()))
    assert_same("outputs", *outs)


@each_host
def test_groups_of_one_are_exact(name: str) -> None:
    model, x = HOSTS[name].model(), HOSTS[name].images()
    sparse(model, keep_ratio=0.3, backend="dense_masked")
    exact = block_rows(model, x)
    vtoken.configure(model, mode="grouped", query_group=1)
    grouped = block_rows(model, x)
    for a, b in zip(exact[2].attention, grouped[2].attention, strict=True):
        assert torch.equal(a.mask, b.mask)
    assert_close("rows", exact[1], grouped[1], 1e-6)


def test_random_masks_keep_the_budget_and_ask_no_predictor() -> None:
    model, x = HOSTS["registers"].model(), HOSTS["registers"].images()
    sparse(model, keep_ratio=0.3, mode="random", seed=4)
    _, _, trace = block_rows(model, x)
    masks = [r.mask for r in trace.attention]
    for mask in masks:
        assert bool((mask[:, :, 3:].sum(-1) == 9).all())  # ceil of 8.1
        assert bool(mask[:, :, :3].all())
        assert torch.equal(mask[0], mask[1])
        assert len({tuple(row.tolist()) for row in mask[0].flatten(0, 1)[3:]}) > 20
    assert not torch.equal(masks[0], masks[1])
    out = run(model, x)
    assert_same("repeated", out, run(model, x))
    sparse_again = sparse(HOSTS["registers"].model(), keep_ratio=0.3, mode="random", seed=4)
    for p in blocks(sparse_again)[0].attn.predictor.parameters():
        p.detach().zero_()
    assert_same("other predictors", out, run(sparse_again, x))
    vtoken.configure(model, seed=5)
    assert not torch.equal(out, run(model, x))


@each_tower
@pytest.mark.parametrize("mode", ["exact", "grouped", "random"])
def test_all_keys_kept_changes_no_bit(name: str, mode: str) -> None:
    model, x = ALL[name].model(), ALL[name].images()
    stock = run(model, x)
    sparse(model, keep_ratio=1.0, mode=mode)
    assert_same("eval", stock, run(model, x))
    with vtoken.tracing(model):
        assert_close("traced", stock, run(model, x), 1e-5)
    vtoken.configure(model, keep_ratio=0.9999)  # still all keys, but through the method
    assert_close("to rounding", stock, run(model, x), 1e-5)


def test_a_budget_of_one_key() -> None:
    for mode in ("exact", "grouped"):
        trace = check("cls", keep_ratio=1e-3, mode=mode, query_group=6)
        assert bool((trace.attention[0].mask[:, :, 1:].sum(-1) == 1).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["auto", "sparse", "masked", "dense_masked"])
def test_rows_without_keys_are_zero_and_never_nan(dtype: torch.dtype, backend: str) -> None:
    model = HOSTS["cls"].model(dtype=dtype)
    sparse(model, mode="threshold", backend=backend)
    for block in blocks(model):
        block.attn.predictor.threshold.fill_(99.0)
    x = HOSTS["cls"].images(dtype=dtype)
    out, trace = block_rows(model, x)[1:]
    assert bool(out.isfinite().all())
    assert all(r.density == 0.0 for r in trace.attention)
    assert bool((trace.attention[0].attention[:, :, 1:] == 0).all())
    model(x).float().square().sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if p.grad is not None]
    assert len(grads) > 20
    assert all(bool(g.isfinite().all()) for g in grads)
    # A patch row that attends to nothing gets the projection's bias alone.
    attn, rows = blocks(model)[0].attn, torch.randn(2, 25, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        assert_close("no values", attn.proj.bias.expand(2, 24, 16), attn(rows)[:, 1:], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["exact", "grouped", "threshold"])
def test_half_precision_is_near_single(dtype: torch.dtype, mode: str) -> None:
    model, x = HOSTS["registers"].model(), HOSTS["registers"].images()
    sparse(model, keep_ratio=0.5, mode=mode, query_group=6)
    full = block_rows(model, x)
    half = block_rows(copy.deepcopy(model).to(dtype), x.to(dtype))
    assert half[1].dtype == dtype
    assert bool(half[1].isfinite().all())
    same = (full[2].attention[0].mask == half[2].attention[0].mask).double().mean()
    assert float(same) > 0.95  # queries and keys are rounded, so some near-ties fall the other way
    assert half[2].attention[0].scores.dtype == torch.float32


@pytest.mark.parametrize("mode", ["exact", "grouped", "threshold"])
def test_masks_do_not_depend_on_autocast(mode: str) -> None:
    """Given the same queries and keys; selection would be another if its products were rounded."""
    method = sparse(HOSTS["registers"].model(), keep_ratio=0.4, mode=mode, query_group=3)._vtoken.methods[
        AttentionMethod
    ]
    model = sparse(HOSTS["registers"].model(), keep_ratio=0.4, mode=mode, query_group=3)
    predictor, rng = blocks(model)[1].attn.predictor, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 27, 8, generator=rng) for _ in range(3))
    masks, scores, first = [], [], []
    for autocast in (False, True):
        call = vtoken.core.state.AttentionCall(1, 3, vtoken.core.state.Slot(embedded=27), GRID, 8**-0.5, wants_cls=True)
        call.record = AttentionRecord(1, wants=frozenset(("mask", "scores")))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            method.attend(q, k, v, predictor, call)
        masks.append(call.record.mask)
        scores.append(call.record.scores)
        first.append(call.cls)
    assert_same("masks", *masks)
    assert_same("scores", *scores)
    assert_same("class rows", *first)


def test_reconstruction_does_not_depend_on_autocast() -> None:
    method = sparse(HOSTS["cls"].model(), phase="recon")._vtoken.methods[AttentionMethod]
    predictor = blocks(sparse(HOSTS["cls"].model()))[1].attn.predictor
    q, k, v = (torch.randn(2, 2, 25, 8, generator=torch.Generator().manual_seed(s)) for s in range(3))
    found: list[tuple[Tensor | None, Tensor | None]] = []
    for autocast in (False, True):
        call = vtoken.core.state.AttentionCall(1, 1, vtoken.core.state.Slot(embedded=25), GRID, 8**-0.5)
        call.record = AttentionRecord(1, wants=frozenset(("attention", "scores")))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            method.attend(q, k, v, predictor, call)
        found.append((call.record.scores, call.record.attention))
    assert_same("scores and attention", *found)


def test_masks_carry_no_gradient_and_predictors_get_none() -> None:
    for config in ({"mode": "exact"}, {"mode": "grouped"}, {"mode": "threshold"}):
        model = sparse(HOSTS["registers"].model(dtype=F64), keep_ratio=0.4, **config).train()
        model(HOSTS["registers"].images(dtype=F64)).square().sum().backward()
        for name, p in model.named_parameters():
            if "predictor" in name:
                assert p.grad is None, name
            elif "k_norm.bias" not in name:
                assert float(p.grad.abs().max()) > 0, name


def test_gradients_are_those_of_dense_attention_under_the_mask() -> None:
    model, x = HOSTS["registers"].model(dtype=F64), HOSTS["registers"].images(dtype=F64)
    sparse(model, keep_ratio=0.4, backend="dense_masked")
    grads = {}
    for backend in ("dense_masked", "masked", "sparse"):
        vtoken.configure(model, backend=backend)
        model.zero_grad()
        model(x).square().sum().backward()
        grads[backend] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for name, g in grads["dense_masked"].items():
        if float(g.abs().max()) > 1e-9:
            assert_close(f"masked {name}", g, grads["masked"][name], 1e-9)
            assert_close(f"sparse {name}", g, grads["sparse"][name], 1e-9)


@pytest.mark.parametrize("mode", ["exact", "grouped", "threshold"])
@pytest.mark.parametrize("pruned", [False, True])
def test_checkpointed_gradients_with_two_forwards_before_one_backward(mode: str, pruned: bool) -> None:
    model = sparse(HOSTS["registers"].model(dtype=F64), keep_ratio=0.4, mode=mode, query_group=5,
                   token_keep_ratio=0.7 if pruned else 1.0, prune_after=(0, 1)).train()  # fmt: skip
    inputs = [HOSTS["registers"].images(dtype=F64), HOSTS["registers"].images(batch=3, seed=1, dtype=F64)]
    grads = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        first, second = (model(x) for x in inputs)
        (first.square().sum() + second.pow(3).sum()).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, g in grads[0].items():
        if float(g.abs().max()) > 1e-9:
            assert_close(name, g, grads[1][name], 1e-10)


def test_dropout_on_the_attention_weights_follows_the_model() -> None:
    """Ours: applied, as the model does (docs/methods/sparsifiner.md 9)."""
    model = randomise_(vit(img_size=(16, 24), embed_dim=16, num_heads=2, attn_drop_rate=0.5), 0).eval()
    x = images((3, 16, 24))
    sparse(model, keep_ratio=0.4)
    out = run(model, x)
    assert_same("eval", out, run(model, x))
    model.train()
    torch.manual_seed(0)
    assert not torch.allclose(run(model, x), run(model, x))


@pytest.mark.parametrize("mode", ["exact", "grouped", "threshold"])
def test_an_image_does_not_depend_on_its_batch(mode: str) -> None:
    model = sparse(HOSTS["registers"].model(dtype=F64), keep_ratio=0.4, mode=mode, query_group=5, token_keep_ratio=0.7,
                   prune_after=(0, 1))  # fmt: skip
    x = HOSTS["registers"].images(batch=4, dtype=F64)
    whole = run(model, x)
    assert_close("permuted", whole[[2, 0, 3, 1]], run(model, x[[2, 0, 3, 1]]), 1e-10)
    for i in range(4):
        assert_close(f"image {i} alone", whole[i : i + 1], run(model, x[i : i + 1]), 1e-10)


@pytest.mark.parametrize("mode", ["exact", "grouped", "threshold"])
def test_an_empty_batch_gives_an_empty_result(mode: str) -> None:
    model = sparse(HOSTS["cls"].model(), keep_ratio=0.4, mode=mode, token_keep_ratio=0.7, prune_after=(1,))
    assert run(model, HOSTS["cls"].images()[:0]).shape == (0, 10)


@pytest.mark.parametrize("mode", ["exact", "grouped", "threshold", "random"])
def test_no_matrix_of_all_pairs_in_a_whole_forward(mode: str) -> None:
    """257 tokens of 4 heads; the widest activation of the model, the MLP's, has 32 numbers per token."""
    model = randomise_(vit(img_size=64, patch_size=4, embed_dim=16, num_heads=4), 0).eval()
    sparse(model, keep_ratio=0.05, mode=mode, num_basis=8)
    if mode == "threshold":
        vtoken.calibrate_threshold(model, images((3, 64, 64), 2), 0.05)
    x = images((3, 64, 64), 1)
    with torch.inference_mode(), Sizes() as sizes:
        model(x)
    assert 0 < sizes.largest < 4 * 257 * 257 // 2
    vtoken.configure(model, backend="dense_masked")
    with torch.inference_mode(), Sizes() as sizes:
        model(x)
    assert sizes.largest >= 4 * 257 * 257


def test_maps_only_on_request() -> None:
    model, x = sparse(HOSTS["cls"].model(), keep_ratio=0.3), HOSTS["cls"].images()
    out, trace = vtoken.trace(model, x)
    assert_same("traced", run(model, x), out.detach())
    assert [(r.layer, r.mask, r.scores, r.attention) for r in trace.attention] == [
        (i, None, None, None) for i in (0, 1, 2)
    ]
    assert [r.kept for r in trace.attention] == [2 * 2 * (25 + 24 * 8)] * 3
    assert trace.attention[0].density == pytest.approx(8 / 25)
    with vtoken.tracing(model, maps=("mask",)) as trace:
        run(model, x)
        run(model, x[:1])
    assert len(trace.attention) == 3
    assert trace.attention[0].mask.shape == (1, 2, 25, 25)
    assert trace.attention[0].scores is None
    with pytest.raises(vtoken.ConfigError, match="maps"), vtoken.tracing(model, maps=("logits",)):
        pass
    vtoken.remove(model)
    vtoken.apply(model, vtoken.PiToMe(ratio=0.8))
    assert vtoken.trace(model, x)[1].attention == []


def test_records_do_not_grow_when_checkpointing_runs_blocks_again() -> None:
    model = sparse(HOSTS["cls"].model(), keep_ratio=0.3).train()
    model.set_grad_checkpointing(True)
    with vtoken.tracing(model) as trace:
        model(HOSTS["cls"].images()).sum().backward()
    assert [r.layer for r in trace.attention] == [0, 1, 2]


def test_the_same_seed_gives_the_same_predictors_and_leaves_the_generators_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states: dict[int, Any] = {}
    # torch.manual_seed would seed the generators of accelerators, which fork_rng does not restore here.
    models = [HOSTS["cls"].model() for _ in range(3)]
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds accelerators, too"))
    for seed, model in zip((0, 0, 7), models, strict=True):
        before = torch.get_rng_state()
        vtoken.apply(model, vtoken.Sparsifiner(seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        found = {n: p.detach().clone() for n, p in vtoken.train.predictor_parameters(model)}
        assert_same("same seed", states.setdefault(seed, found), found)
    assert not torch.equal(states[0]["blocks.0.attn.predictor.w_up"], states[7]["blocks.0.attn.predictor.w_up"])
    assert not torch.equal(states[0]["blocks.0.attn.predictor.w_up"], states[0]["blocks.1.attn.predictor.w_up"])


@pytest.mark.parametrize("mode", ["exact", "random"])
def test_nothing_depends_on_torchs_default_dtype(mode: str) -> None:
    """Programs set it while they build models; predictors, draws and the sizes of merged tokens do not follow it."""
    host, found = HOSTS["registers"], []
    config = [vtoken.ToMe(r=5), vtoken.Sparsifiner(keep_ratio=0.4, mode=mode)]
    stock, x = host.model(), host.images(batch=2)
    for default in (torch.float32, F64, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            model = vtoken.apply(copy.deepcopy(stock), config)
            out, trace = vtoken.trace(model, x)
        finally:
            torch.set_default_dtype(torch.float32)
        found.append((dict(model.state_dict()), out, trace.size))
    for other in found[1:]:
        assert_same("parameters, rows and sizes", found[0], other)


def test_initial_values() -> None:
    """Section 2: deviation 0.02, zero biases, K = N // 6 up to 32."""
    model = vtoken.apply(vit(img_size=224, patch_size=16, embed_dim=64, num_heads=1, depth=1), vtoken.Sparsifiner())
    p = model.blocks[0].attn.predictor
    assert p.w_down.shape == p.w_up.shape == (197, 32)
    assert p.reduce_q.weight.shape == p.reduce_k.weight.shape == (32, 64)
    for w in (x.detach() for x in (p.w_down, p.w_up, p.reduce_q.weight, p.reduce_k.weight)):
        assert float(w.std()) == pytest.approx(0.02, rel=0.1)
        assert abs(float(w.mean())) < 0.002
    assert not bool(p.reduce_q.bias.any() or p.reduce_k.bias.any())
    large = vtoken.apply(vit(img_size=384, patch_size=16, embed_dim=64, num_heads=1, depth=1), vtoken.Sparsifiner())
    assert large.blocks[0].attn.predictor.w_up.shape == (577, 32)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep_ratio": 0}, "keep_ratio"), ({"keep_ratio": 1.2}, "keep_ratio"),
        ({"keep_ratio": (0.5, 0)}, "keep_ratio"),
        ({"keep_ratio": "a"}, "keep_ratio"), ({"keep_ratio": True}, "keep_ratio"), ({"mode": "exat"}, "exact"),
        ({"phase": "joint"}, "phase"), ({"backend": "tritn"}, "backend"), ({"query_group": 0}, "query_group"),
        ({"query_group": 1.5}, "query_group"), ({"coef_topk": -1}, "coef_topk"),
        ({"coef_threshold": -1.0}, "coef_threshold"), ({"num_basis": 0}, "num_basis"),
        ({"num_basis": (3, 4)}, "num_basis"), ({"reduce_c_factor": 0}, "reduce_c_factor"), ({"seed": -1}, "seed"),
        ({"token_keep_ratio": 0}, "token_keep_ratio"), ({"token_keep_ratio": "a"}, "token_keep_ratio"),
        ({"basis_threshold": -0.1}, "basis_threshold"), ({"score_threshold": float("nan")}, "score_threshold"),
        ({"scale": "q"}, "scale"), ({"layers": "all"}, "layers"), ({"prune_after": (1.5,)}, "prune_after"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_by_name(options: dict[str, Any], match: str) -> None:
    with pytest.raises(vtoken.ConfigError, match=match):
        vtoken.Sparsifiner(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers": (3,)}, r"layers=\[3\].*blocks 0..2"), ({"keep_ratio": (0.5, 0.5)}, "keep_ratio.*3 blocks"),
        ({"token_keep_ratio": 0.5, "prune_after": (5,)}, r"prune_after=\[5\].*blocks 0..2"),
        ({"token_keep_ratio": 0.5, "prune_after": (2,), "layers": (0, 1)}, "prune_after.*layers"),
        ({"reduce_c_factor": 100}, "reduce_c_factor"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_model_are_refused(options: dict[str, Any], match: str) -> None:
    model = HOSTS["cls"].model()
    with pytest.raises(vtoken.ConfigError, match=match):
        vtoken.apply(model, vtoken.Sparsifiner(**options))
    assert not vtoken.is_applied(model)


def test_settings_round_trip() -> None:
    config = vtoken.Sparsifiner(keep_ratio=(0.5, 0.25), layers=[0, 1], mode="grouped", num_basis=8, scale=0.5)
    assert vtoken.config_from_dict(config.to_dict()) == config
    assert hash(config) == hash(config.replace())
    assert config.layers == (0, 1)


def module_like(name: str, config: vtoken.Sparsifiner) -> tuple[Any, Any]:
    """vtoken.nn.SparseAttention with the weights of the first attention of a patched timm model."""
    model = sparse(HOSTS[name].model(dtype=F64), config)
    attn = blocks(model)[0].attn
    module = vtoken.nn.SparseAttention(16, 2, grid=GRID, num_prefix=model.num_prefix_tokens, config=config).to(F64)
    assert module.state_dict().keys() == attn.state_dict().keys()
    module.load_state_dict(attn.state_dict())
    return module, attn


@pytest.mark.parametrize("mode", ["exact", "grouped", "threshold", "random"])
@pytest.mark.parametrize("name", ["cls", "no prefix"])
def test_the_module_is_the_patched_attention(name: str, mode: str) -> None:
    module, attn = module_like(name, vtoken.Sparsifiner(keep_ratio=0.4, mode=mode, query_group=5))
    rows = torch.randn(2, 24 + (name == "cls"), 16, generator=torch.Generator().manual_seed(0), dtype=F64)
    record = AttentionRecord(0, wants=frozenset(("mask",)))
    for mask in (None, torch.randn(rows.shape[1], rows.shape[1], dtype=F64), torch.rand(rows.shape[1]).expand(
        rows.shape[1], -1) > 0.3):  # fmt: skip
        assert_close("output", attn(rows, attn_mask=mask), module(rows, attn_mask=mask, record=record), 1e-12)
    assert record.mask.shape == (2, 2, rows.shape[1], rows.shape[1])
    twin = copy.deepcopy(module)
    assert_same("copy", module(rows), twin(rows))


def test_a_trace_of_the_module() -> None:
    """As of the patched attention that it is; also of a network that holds several, forward by forward."""
    module, attn = module_like("cls", vtoken.Sparsifiner(keep_ratio=0.4))
    rows = torch.randn(2, 25, 16, generator=torch.Generator().manual_seed(0), dtype=F64)
    expected = AttentionRecord(0, wants=frozenset(("mask", "scores", "attention")))
    out = module(rows, record=expected)
    with vtoken.tracing(module, maps=("mask", "scores", "attention")) as found:
        assert torch.equal(module(rows), out)
    [record] = found.attention
    assert (record.layer, record.density, record.kept) == (0, expected.density, expected.kept)
    assert 0 < record.density < 1
    for name in ("mask", "scores", "attention"):
        assert torch.equal(getattr(record, name), getattr(expected, name)), name
    assert (found.num_forwards, found.num_prefix, found.grid, found.tokens) == (1, 1, GRID, [25, 25])
    assert vtoken.trace(module, rows)[1].attention[0].mask is None

    network = torch.nn.Sequential(module, torch.nn.Identity(), copy.deepcopy(module), copy.deepcopy(module))
    with vtoken.tracing(network, maps=("mask",)) as several:
        network(rows)
        network(rows[:1])
    assert several.num_forwards == 2
    assert [r.layer for r in several.attention] == [0, 1, 2]
    assert [len(r.mask) for r in several.attention] == [1, 1, 1]
    assert several.tokens == [25] * 4
    assert not torch.equal(several.attention[0].mask, several.attention[1].mask)
    assert several.kept(0, layer=2).tolist() == list(range(24))
    assert module(rows).equal(out)
    assert len(several.attention) == 3
    assert attn is not module


def test_the_module_refuses_what_does_not_fit() -> None:
    with pytest.raises(vtoken.ConfigError, match="heads"):
        vtoken.nn.SparseAttention(16, 3, grid=GRID)
    with pytest.raises(vtoken.ShapeError, match="25"):
        vtoken.nn.SparseAttention(16, 2, grid=GRID)(torch.randn(1, 26, 16))


@pytest.mark.parametrize(("mode", "backend"), [("exact", "grouped"), ("threshold", "grouped"), ("grouped", "sparse")])
def test_a_backend_that_does_not_serve_the_mode_is_refused(mode: str, backend: str) -> None:
    with pytest.raises(vtoken.ConfigError, match="does not serve"):
        vtoken.Sparsifiner(mode=mode, backend=backend)


def test_the_map_of_queries_whose_keys_a_mask_took_is_zero() -> None:
    host = HOSTS["registers"]
    model = sparse(host.model(), vtoken.Sparsifiner(keep_ratio=1.0))
    mask = torch.zeros(1, 1, 1, vtoken.plan(model).tokens[0], dtype=torch.bool)
    with vtoken.tracing(model, maps=("attention",)) as record, torch.no_grad():
        model.forward_features(host.images(), attn_mask=mask)
    assert record.attention is not None
    assert all(bool((a.attention == 0).all()) for a in record.attention)


@pytest.mark.parametrize("training", [True, False])
def test_learned_parts_are_in_the_mode_of_the_model(training: bool) -> None:
    model = vit(depth=2).train(training)
    vtoken.apply(model, vtoken.Sparsifiner(keep_ratio=0.5))
    assert {module.training for module in model.modules()} == {training}
