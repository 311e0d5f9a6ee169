"""What leaves a merged model: features, heads, poolings, maps, and their order (docs/methods/pitome.md 5 and 7)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
from tests.contract.table import (
    PITOME,
    MethodRow,
    attention,
    blocks,
    dense,
    every_case,
    every_host,
    features,
    final_norm,
    full_table,
    layer_maps,
    layer_rows,
    library_of,
    run,
    traced,
)
from tests.contract.table import host as host_row
from tests.helpers import Host, assert_all_close, assert_close, assert_same


def still_(model: Any) -> Any:
    """Both branches of every block add nothing: tokens change by merging alone."""
    with torch.no_grad():
        for block in blocks(model):
            attn, mlp = attention(block), block.mlp
            parts = [
                next(getattr(attn, name) for name in ("proj", "out_proj", "o_proj") if hasattr(attn, name)),
                next(getattr(mlp, name) for name in ("fc2", "w2", "c_proj", "down_proj") if getattr(mlp, name, None)),
            ]
            if "Post" in type(block).__name__:
                parts = [block.norm1, block.norm2]
            for part in parts:
                part.weight.zero_()
                part.bias.zero_()
    return model


def embedded(model: Any, x: Tensor) -> Tensor:
    """What enters block 0, [B, T0, C]."""
    seen: list[Tensor] = []
    handle = blocks(model)[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    run(model, x)
    handle.remove()
    return seen[0]


def group_means(rows: Tensor, dest: Tensor) -> Tensor:
    """Mean of the embedded rows of every group, by a plain loop."""
    count = int(dest.max()) + 1
    return torch.stack(
        [torch.stack([r[d == g].mean(0) for g in range(count)]) for r, d in zip(rows, dest, strict=True)]
    )


@every_host()
def test_without_mixing_every_token_is_the_mean_of_its_patches(host: Host, method: MethodRow) -> None:
    model, x = still_(host.model(dtype=torch.float64)), host.images(dtype=torch.float64)
    vtoken.apply(model, method.reduces)
    rows = embedded(model, x)
    out, trace = features(model, x)
    assert trace.dest is not None
    assert trace.anchor is not None
    if method.keeps_mass:
        expected = group_means(rows, trace.dest)
    else:  # what is left after pruning is what was there
        expected = torch.stack([r[a] for r, a in zip(rows, trace.anchor, strict=True)])
    norm, makes_rows = final_norm(model), out.shape[1] == trace.tokens[-1]  # a backbone makes dense maps only
    if makes_rows:
        assert_close("features", norm(expected), out, 1e-10)
    if not method.keeps_mass:
        return
    maps, layers = layer_maps(model, x)
    assert len(maps) in (0, 3)
    for layer, found in enumerate(maps):
        dest = layers.layer_dest[layer]
        wanted = dense(group_means(rows, dest), dest)
        wanted = (wanted if makes_rows else norm(wanted))[:, trace.num_prefix :]
        assert_close(f"map of block {layer}", wanted, found.flatten(2).transpose(1, 2), 1e-10)
    after, layers = layer_rows(model, x)
    assert len(after) == 3
    for layer, found in enumerate(after):
        dest = layers.layer_dest[layer]
        wanted = group_means(rows, dest)
        assert_close(f"rows of block {layer}", wanted if makes_rows else dense(wanted, dest), found, 1e-10)


@every_host("open_clip")
def test_open_clips_maps_are_its_rows_spread_over_the_grid(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    vtoken.apply(model, method.reduces)
    (maps, trace), (rows, _) = layer_maps(model, x), layer_rows(model, x)
    assert len(maps) == len(rows) == 3
    for layer, (row, found) in enumerate(zip(rows, maps, strict=True)):
        assert row.shape[1] == trace.tokens[layer + 1]
        wanted = dense(row, trace.layer_dest[layer])[:, trace.num_prefix :]
        assert_same(f"map of block {layer}", wanted, found.flatten(2).transpose(1, 2))


@every_case("timm")
def test_maps_are_the_rows_spread_over_the_grid(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    vtoken.apply(model, method.reduces)
    (last, rows), trace = traced(model, x, "forward_intermediates", output_fmt="NLC")
    (again, maps), _ = traced(model, x, "forward_intermediates", output_fmt="NCHW")
    assert trace.grid is not None
    height, width = trace.grid
    assert_same("final features", last, again)
    assert_same("final features and forward_features", last, traced(model, x, "forward_features")[0])
    for layer, (row, found) in enumerate(zip(rows, maps, strict=True)):
        assert found.is_contiguous(), "as the host's own maps, which callers may view"
        assert row.shape[1] == trace.tokens[layer + 1] - trace.num_prefix
        dest = trace.layer_dest[layer][:, trace.num_prefix :] - trace.num_prefix
        wanted = dense(row, dest).transpose(1, 2).reshape(x.shape[0], -1, height, width)
        assert_same(f"map of block {layer}", wanted.contiguous(), found.contiguous())
    with torch.no_grad():
        stopped = model.forward_intermediates(x, indices=[0, 1], stop_early=True, norm=True, intermediates_only=True)
    normed = [model.norm(traced(model, x, "forward_intermediates", output_fmt="NLC")[0][1][i]) for i in (0, 1)]
    for i in (0, 1):
        dest = trace.layer_dest[i][:, trace.num_prefix :] - trace.num_prefix
        assert_close(f"normed map {i}", dense(normed[i], dest), stopped[i].flatten(2).transpose(1, 2), 1e-5)


@every_host("timm")
def test_intermediates_with_prefix_tokens(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    if not model.num_prefix_tokens:
        pytest.skip("no prefix tokens")
    stock = host.model()
    vtoken.apply(model, method.reduces)
    with torch.no_grad():
        maps = model.forward_intermediates(x, indices=[2], intermediates_only=True, return_prefix_tokens=True)
        rows = model.forward_intermediates(
            x, indices=1, intermediates_only=True, return_prefix_tokens=True, output_fmt="NLC"
        )
        full = stock.forward_intermediates(x, indices=[2], intermediates_only=True, return_prefix_tokens=True)
    assert maps[0][0].shape == full[0][0].shape
    assert maps[0][1].shape == full[0][1].shape
    assert_same("prefix tokens in both formats", maps[0][1], rows[0][1])


def _heads_agree(host: Host, method: MethodRow, config: vtoken.MethodConfig) -> None:
    model, stock = host.model(dtype=torch.float64), host.model(dtype=torch.float64)
    x = host.images(dtype=torch.float64)
    vtoken.apply(model, config)
    out, trace = features(model, x)
    assert trace.dest is not None
    with torch.no_grad():
        head = model.forward_head(out)
        pre = model.forward_head(out, pre_logits=True)
        whole = stock.forward_head(dense(out, trace.dest)) if method.keeps_mass else stock.forward_head(out)
        before = stock.forward_head(dense(out, trace.dest) if method.keeps_mass else out, pre_logits=True)
    direct = run(model, x)
    assert_close("forward_head(forward_features(x)) and model(x)", direct, head, 1e-10)
    if head.dim() == 3 and method.keeps_mass:  # no pooling: one prediction per token
        head, pre = dense(head, trace.dest), dense(pre, trace.dest)
    assert_close("head of the unmerged features", whole, head, 1e-10)
    assert_close("pooled unmerged features", before, pre, 1e-10)


@full_table("timm")
def test_pooling_and_head_are_those_of_the_unmerged_features(host: Host, method: MethodRow) -> None:
    """A token of s patches must count as s equal rows in every pooling: mean, maximum, attention pools."""
    _heads_agree(host, method, method.reduces)


@every_case("timm")
def test_head_after_features_when_nothing_is_removed(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    with torch.no_grad():
        stock = model.forward_head(model.forward_features(x))
        for config in method.noops:
            with vtoken.applied(model, config):
                assert_same(str(config), stock, model.forward_head(model.forward_features(x)))


@pytest.mark.parametrize("name", ["vit_avg_prefix", "vit_map", "vit_prr_token", "eva_rope", "naflex_rope"])
def test_head_of_features_whose_sizes_are_lost_is_not_silently_wrong(name: str) -> None:
    host = host_row(name)
    model = vtoken.apply(host.model(), PITOME.reduces)
    with torch.no_grad():
        out = model.forward_features(host.images())
        with pytest.raises(vtoken.ShapeError, match="sizes"):
            model.forward_head(out.clone())


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "token"])
def test_pool_type_override_counts_patches(pool: str) -> None:
    host = host_row("vit_reg")
    model, stock = host.model(dtype=torch.float64), host.model(dtype=torch.float64)
    vtoken.apply(model, PITOME.reduces)
    model.reset_classifier(10, pool)
    stock.reset_classifier(10, pool)
    stock.head.load_state_dict(model.head.state_dict())
    x = host.images(dtype=torch.float64)
    out, trace = features(model, x)
    assert trace.dest is not None
    with torch.no_grad():
        whole = stock.forward_head(dense(out, trace.dest))
    assert_close("head", whole, run(model, x), 1e-10)


@every_host()
def test_order_internal_is_a_permutation_of_raster(host: Host, method: MethodRow) -> None:
    if not method.removes:
        pytest.skip("leaves rows where they are")
    model, x = host.model(), host.images()
    vtoken.apply(model, method.reduces)
    raster, trace = features(model, x)
    before = run(model, x)
    vtoken.configure(model, order="internal")
    internal, _ = features(model, x)
    if library_of(model) == "timm":
        assert_close("logits", *_pooled(model, x), 1e-5)
    else:
        assert_close("output", before, run(model, x), 1e-5)
    if raster.shape[1] != trace.tokens[-1]:
        assert_close("dense maps have no order", raster, internal, 1e-6)
        return
    assert trace.anchor is not None
    for b in range(x.shape[0]):
        distance = torch.cdist(raster[b], internal[b])
        match = distance.argmin(1)
        assert sorted(match.tolist()) == list(range(raster.shape[1]))
        assert_close("rows", raster[b], internal[b][match], 1e-6)
    assert torch.equal(raster[:, : trace.num_prefix], internal[:, : trace.num_prefix])
    if method is PITOME:
        assert not torch.equal(raster, internal)


def _pooled(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Order-free outputs: with rows sorted where the model does not pool."""
    with torch.no_grad():
        direct, by_head = model(x), model.forward_head(model.forward_features(x))
    return (direct.sort(1).values, by_head.sort(1).values) if direct.dim() == 3 else (direct, by_head)


@pytest.mark.parametrize("headless", [False, True])
def test_tokens_without_pooling_leave_in_raster_order(headless: bool) -> None:
    """Whatever hands tokens out hands them out in raster order, `model(x)` of a model without pooling included."""
    host = host_row("vit_nopool")
    model, x = host.model(), host.images()
    vtoken.apply(model, PITOME.reduces)
    if headless:
        model.reset_classifier(0, "")
    with torch.no_grad():
        expected = model.head(model.fc_norm(model.forward_features(x)))
    assert_close("tokens", expected, run(model, x), 1e-5)


def test_unmerge_spreads_rows_of_any_layer() -> None:
    host = host_row("vit_reg")
    model, x = host.model(), host.images()
    vtoken.apply(model, PITOME.reduces)
    out, trace = features(model, x)
    assert trace.dest is not None
    assert_same("last", dense(out, trace.dest), vtoken.unmerge(out, trace))
    (_, rows), trace = traced(model, x, "forward_intermediates", output_fmt="NLC", return_prefix_tokens=True)
    for layer, (patches, prefix) in enumerate(rows):
        whole = torch.cat([prefix, patches], 1)
        assert_same("layer", dense(whole, trace.layer_dest[layer]), vtoken.unmerge(whole, trace, layer=layer))
    with pytest.raises(vtoken.ShapeError):
        vtoken.unmerge(out[:, 1:], trace)
    with pytest.raises(vtoken.ShapeError):
        vtoken.unmerge(out, vtoken.Trace())


def test_dino_style_get_intermediate_layers() -> None:
    host = host_row("vit_avg_prefix")
    model, x = host.model(), host.images()
    vtoken.apply(model, PITOME.reduces)
    with torch.no_grad():
        maps = model.get_intermediate_layers(x, n=2, reshape=True)
        expected = model.forward_intermediates(x, indices=2, intermediates_only=True)
        as_dict = model.forward_intermediates(x, output_dict=True, indices=2, return_prefix_tokens=True)
        out = model.forward_features(x)
    assert_same("maps", expected, maps)
    assert_same("maps in the dictionary", expected, as_dict["image_intermediates"])
    assert_same("features in the dictionary", out, as_dict["image_features"])
    assert [p.shape[1] for p in as_dict["image_intermediates_prefix"]] == [3, 3]
    assert_all_close("head", run(model, x), model.forward_head(as_dict["image_features"]), 1e-5)


def test_a_max_pool_of_a_merged_map_is_that_of_its_rows() -> None:
    host = host_row("vit_max")
    model, x = host.model(), host.images()
    vtoken.apply(model, PITOME.reduces)
    with torch.no_grad():
        rows = model.forward_features(x)
        assert_close("max", model.head(model.fc_norm(rows.amax(1))), model(x), 1e-5)


def test_features_keep_their_sizes_through_saving_and_copying(tmp_path: Any) -> None:
    """Sizes ride on the features; whoever stores and reloads them must get the right pooling or an error."""
    host = host_row("vit_avg_prefix")
    model, x = host.model(), host.images()
    vtoken.apply(model, PITOME.reduces)
    out, _ = features(model, x)
    torch.save(out, tmp_path / "features.pt")
    back = torch.load(tmp_path / "features.pt", weights_only=False)
    try:
        logits = model.forward_head(back)
    except vtoken.ShapeError:
        return
    assert_close("logits", run(model, x), logits, 1e-5)
