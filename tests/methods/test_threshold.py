"""Merging by a threshold: against its definition in slow loops, in all three libraries; what is said of counts."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor

import vtoken
from tests.contract.table import features, final_norm, host, installed, outputs, run, tower, traced
from tests.helpers import Host, assert_close, assert_same, vit
from vtoken import ConfigError, ThresholdMerge, ToMe
from vtoken.ops import plan_threshold, plan_tome
from vtoken.ops.reference import threshold_reference

#: Of each library towers that differ in what merging touches.
HOSTS = ["vit_token", "vit_avg_prefix", "vit_map", "eva02", *installed("oc_token", "oc_avg", "oc_clip", "hf_clip")]


def clustered(seed: int, batch: int, tokens: int, noise: float = 0.3) -> Tensor:
    """Vectors around a few centres, so that cosines lie on both sides of a threshold; noisier from image to image."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 6, generator=rng, dtype=torch.float64)
    rows = centres[torch.randint(4, (batch, tokens), generator=rng)]
    scale = torch.linspace(1, 2, batch, dtype=torch.float64).view(-1, 1, 1)
    return rows + noise * scale * torch.randn(batch, tokens, 6, generator=rng, dtype=torch.float64)


# --- the plan ---


@pytest.mark.parametrize("num_prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("tokens", [5, 6, 7, 18, 23])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.7, 0.9, 0.97, 1.0])
def test_plan_is_that_of_the_definition(num_prefix: int, tokens: int, threshold: float) -> None:
    counts = set()
    for seed, batch in ((0, 1), (1, 2), (2, 3)):
        metric = clustered(seed, batch, tokens)
        for r in (0, 2, 99):
            plan = plan_threshold(metric, r, threshold=threshold, num_prefix=num_prefix)
            slow = threshold_reference(metric, r, threshold=threshold, num_prefix=num_prefix)
            counts.add(plan.removed)
            assert plan.keep.tolist() == slow.keep
            for b in range(batch):
                assert dict(zip(plan.src[b].tolist(), plan.slot[b].tolist(), strict=True)) == dict(
                    zip(slow.src[b], slow.slot[b], strict=True)
                )
            if plan.removed:
                tome = plan_tome(metric, plan.removed, num_prefix=num_prefix)
                assert torch.equal(plan.keep, tome.keep)
                assert torch.equal(plan.dest, tome.dest)
    assert counts == {0} if threshold == 1 else len(counts) > 1 or tokens < 18, "large enough, some merge"


def test_the_batch_takes_the_least_and_no_pair_below_the_threshold_merges() -> None:
    metric, threshold = clustered(3, 4, 31), 0.9
    alone = [plan_threshold(metric[b : b + 1], 99, threshold=threshold).removed for b in range(4)]
    assert len(set(alone)) > 1
    plan = plan_threshold(metric, 99, threshold=threshold)
    assert plan.removed == min(alone) > 0
    for b in range(4):
        merged = [
            torch.cosine_similarity(metric[b, s], metric[b, plan.keep[b, o]], dim=0)
            for s, o in zip(plan.src[b], plan.slot[b], strict=True)
        ]
        assert min(merged) > threshold


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_rows_are_not_above_one(dtype: torch.dtype) -> None:
    equal = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(0)).expand(2, 14, 48).to(dtype)
    assert plan_threshold(equal, 99, threshold=1.0).removed == 0
    assert plan_threshold(equal, 99, threshold=0.999).removed == 7


def test_edges_of_the_plan() -> None:
    assert plan_threshold(torch.randn(0, 9, 4), 5, threshold=-1.0).num_tokens == 9
    assert plan_threshold(torch.full((1, 9, 4), math.nan), 5, threshold=-1.0).removed == 0
    assert plan_threshold(torch.zeros(1, 9, 4), 5, threshold=0.0).removed == 0  # a zero row is like nobody
    for num_prefix in (8, 9):
        assert plan_threshold(torch.ones(1, 9, 4), 5, threshold=-1.0, num_prefix=num_prefix).removed == 0
    with pytest.raises(vtoken.ShapeError):
        plan_threshold(torch.ones(1, 9, 4), 5, threshold=0.0, num_prefix=10)


# --- towers ---


class Parts(NamedTuple):
    """One block in plain functions of one image's rows [T, C]."""

    norm1: Callable[[Tensor], Tensor]
    qkv: Callable[[Tensor], list[Tensor]]
    out: Callable[[Tensor], Tensor]
    norm2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    heads: int


def parts_of(block: Any) -> Parts:
    """Of timm's Block, open_clip's ResidualAttentionBlock or transformers' CLIP layer."""
    attn = block.self_attn if hasattr(block, "self_attn") else block.attn

    def packed(x: Tensor) -> list[Tensor]:
        return list((x @ attn.in_proj_weight.T + attn.in_proj_bias).chunk(3, -1))

    def three(x: Tensor) -> list[Tensor]:
        return [attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)]

    def joined(x: Tensor) -> list[Tensor]:
        return list(attn.qkv(x).chunk(3, -1))

    if hasattr(block, "ln_1"):
        norm1, qkv, out, norm2 = block.ln_1, packed, lambda x: block.ls_1(attn.out_proj(x)), block.ln_2
        return Parts(norm1, qkv, out, norm2, lambda x: block.ls_2(block.mlp(x)), attn.num_heads)
    if attn is not getattr(block, "attn", None):
        return Parts(block.layer_norm1, three, attn.out_proj, block.layer_norm2, block.mlp, attn.num_heads)
    norm1, out, norm2 = block.norm1, lambda x: block.ls1(attn.proj(x)), block.norm2
    return Parts(norm1, joined, out, norm2, lambda x: block.ls2(block.mlp(x)), attn.num_heads)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / float(a.norm() * b.norm())


def run_slowly(
    blocks: list[Any], embedded: Tensor, threshold: float, prefix: int
) -> tuple[list[list[int]], list[Tensor], list[list[list[int]]]]:
    """From docs/methods/threshold.md 2: proposals above the threshold of each image, rows, and members of each row."""
    images = [list(rows) for rows in embedded]
    members = [[[i] for i in range(len(rows))] for rows in images]
    allowed = []
    for block in blocks:
        p, proposals = parts_of(block), []
        for b, rows in enumerate(images):
            x = torch.stack(rows)
            q, k, v = (y.reshape(len(rows), p.heads, -1).transpose(0, 1) for y in p.qkv(p.norm1(x)))
            logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
            logits = logits + torch.tensor([math.log(len(m)) for m in members[b]], dtype=x.dtype)
            attended = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
            images[b] = list(x + p.out(attended))
            keys = k.mean(0)
            odd = [j for j in range(prefix, len(rows)) if j % 2 == 1]
            best = {i: max(odd, key=lambda j, i=i: cosine(keys[i], keys[j]))
                    for i in range(prefix, len(rows)) if i % 2 == 0}  # fmt: skip
            found = [(cosine(keys[i], keys[j]), i, j) for i, j in best.items()]
            proposals.append(sorted([f for f in found if f[0] > threshold], reverse=True))
        allowed.append([len(found) for found in proposals])
        count = min(allowed[-1])
        for b, found in enumerate(proposals):
            goes = {i: j for _, i, j in found[:count]}
            stay = [i for i in range(len(images[b])) if i not in goes]
            # Prefix, even rows, odd rows: parity in the next block goes by this order.
            stay = [i for i in stay if i < prefix] + sorted([i for i in stay if i >= prefix], key=lambda i: (i % 2, i))
            groups = {j: [j, *(i for i in goes if goes[i] == j)] for j in stay}
            size = {i: len(members[b][i]) for i in range(len(images[b]))}
            images[b] = [
                sum(size[i] * images[b][i] for i in group) / sum(size[i] for i in group) for group in groups.values()
            ]
            members[b] = [[m for i in group for m in members[b][i]] for group in groups.values()]
            rows = torch.stack(images[b])
            images[b] = list(rows + p.mlp(p.norm2(rows)))
    return allowed, [torch.stack(rows) for rows in images], members


@pytest.mark.parametrize("name", ["vit_token", "vit_avg_prefix", *installed("oc_token", "oc_avg", "hf_clip")])
def test_a_tower_is_that_of_the_definition(name: str) -> None:
    row, threshold = host(name), 0.65
    model, x = row.model(dtype=torch.float64), row.images(batch=3, dtype=torch.float64)
    inner, entered = tower(model), []
    blocks = inner.blocks if hasattr(inner, "blocks") else None
    if blocks is None:
        blocks = inner.transformer.resblocks if hasattr(inner, "transformer") else inner.encoder.layers
    handle = blocks[0].register_forward_pre_hook(lambda m, args, kwargs: entered.append(args[0]), with_kwargs=True)
    run(model, x)
    handle.remove()
    prefix = row.num_prefix(model)
    with torch.no_grad():
        allowed, slow, members = run_slowly(list(blocks), entered[0], threshold, prefix)
    assert any(len(set(found)) > 1 for found in allowed), "images that allow equally many test nothing"
    vtoken.apply(model, ThresholdMerge(threshold=threshold))
    rows, trace = features(model, x)
    assert [a - b for a, b in zip(trace.tokens, trace.tokens[1:], strict=False)] == [min(found) for found in allowed]
    assert trace.dest is not None
    assert trace.size is not None
    for b, groups in enumerate(members):
        found = [(trace.dest[b] == g).nonzero().flatten().tolist() for g in range(trace.tokens[-1])]
        assert sorted(found) == sorted(sorted(group) for group in groups)
        assert trace.size[b].tolist() == [len(group) for group in found]
        with torch.no_grad():
            normed = final_norm(model)(slow[b])
        by_group = {tuple(sorted(group)): normed[i] for i, group in enumerate(groups)}
        assert_close("rows", torch.stack([by_group[tuple(group)] for group in found]), rows[b], 1e-9)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("options", [{}, {"metric": "hidden"}, {"prop_attn": False, "place": "after"}], ids=str)
def test_where_nothing_is_alike_no_bit_changes(name: str, options: dict[str, Any]) -> None:
    row = host(name)
    model, x = row.model(), row.images()
    stock = outputs(model, x)
    vtoken.apply(model, ThresholdMerge(threshold=0.9999, **options))
    assert not vtoken.plan(model, img_size=row.shape[1:]).exact
    assert_same(name, stock, outputs(model, x))
    assert traced(model, x)[1].tokens[-1] == traced(model, x)[1].tokens[0]
    vtoken.configure(model, threshold=0.6)
    assert traced(model, x)[1].tokens[-1] < traced(model, x)[1].tokens[0], "it would have merged"


@pytest.mark.parametrize("name", installed("oc_token", "oc_avg"))
@pytest.mark.parametrize("training", [False, True])
def test_open_clips_own_attention_runs_before_the_first_merge(name: str, training: bool) -> None:
    """Also with gradients, and where its kernels for inference do not run."""
    row = host(name)
    model, x = row.model().train(training), row.images()
    stock = model(x)
    vtoken.apply(model, ThresholdMerge(threshold=0.9999))
    assert torch.equal(stock, model(x))


def test_an_image_alone_depends_on_no_other_and_in_a_batch_it_does() -> None:
    row = host("vit_avg_prefix")
    model, x = row.model(dtype=torch.float64), row.images(batch=3, dtype=torch.float64)
    vtoken.apply(model, ThresholdMerge(threshold=0.85))
    alone = [traced(model, x[b : b + 1]) for b in range(3)]
    together, trace = traced(model, x)
    first = [t.tokens[1] for _, t in alone]
    assert len(set(first)) > 1
    assert trace.tokens[1] == max(first), "the least removed is the most kept"
    assert not torch.allclose(together[1], alone[1][0][0]), "documented: in a batch the others count"
    for b in range(3):
        assert torch.equal(alone[b][0], run(model, x[b : b + 1]))


def test_a_cap_is_never_passed() -> None:
    row = host("vit_token")
    model, x = row.model(), row.images()
    for options in ({"ratio": 0.9}, {"r": 4}, {"r": [9, 0, 2]}, {"ratio": 0.8, "layers": (1,)}):
        with vtoken.applied(model, ThresholdMerge(threshold=-1.0, **options)):
            plan, tokens = vtoken.plan(model), tuple(traced(model, x)[1].tokens)
        assert tokens == plan.least == vtoken.plan(model, ToMe(**options)).tokens, "everything is above -1"
        assert plan.tokens == (65,) * 4
    one = ThresholdMerge(threshold=[-1, 1, -1])
    with vtoken.applied(model, one):
        tokens = traced(model, x)[1].tokens
        assert tokens[2] == tokens[1] < tokens[0]
        assert tokens[3] < tokens[2]


def test_what_follows_a_merge_is_as_for_tome() -> None:
    """Sizes, proportional attention, pooling, maps: with everything above the threshold it is ToMe to the bit.

    Not in open_clip's plain towers, whose own kernels run here up to the first merge; see the definition above.
    """
    for name in ["vit_avg_prefix", "eva02", *installed("oc_qk_norm", "hf_dino_maps")]:
        row = host(name)
        model, x = row.model(), row.images()
        with vtoken.applied(model, ToMe(ratio=0.8)):
            expected, rows = outputs(model, x), features(model, x)
        with vtoken.applied(model, ThresholdMerge(threshold=-1.0, ratio=0.8)):
            assert_same(name, expected, outputs(model, x))
            found, trace = features(model, x)
        assert_same("features", rows[0], found)
        if name == "vit_avg_prefix":
            assert_same("spread", vtoken.unmerge(rows[0], rows[1]), vtoken.unmerge(found, trace))


# --- counts that the images decide ---


def test_plan_gives_bounds_and_prints_them() -> None:
    model = timm.create_model("test_vit")
    plan = vtoken.plan(model, "threshold_merge", threshold=0.8)
    assert (plan.exact, plan.tokens, plan.least) == (False, (101,) * 7, vtoken.plan(model, ToMe(ratio=0.5)).tokens)
    assert plan.removed == vtoken.plan(model, ToMe(ratio=0.5)).removed
    text = str(plan)
    assert "the images decide" in text
    assert "51 to 101" in text
    assert "removed" not in text
    for nothing in (ThresholdMerge(layers=()), ThresholdMerge(r=0), ThresholdMerge(threshold=1.0)):
        sure = vtoken.plan(model, nothing)
        assert (sure.exact, sure.tokens, sure.least) == (True, (101,) * 7, (101,) * 7)
    exact = vtoken.plan(model, ToMe(r=3))
    assert exact.exact
    assert exact.least == exact.tokens
    assert "removed" in str(exact)


def test_report_gives_bounds_and_says_so() -> None:
    model = timm.create_model("test_vit")
    cost, most_merged = vtoken.report(model, ThresholdMerge()), vtoken.report(model, ToMe(ratio=0.5))
    assert not cost.exact
    assert cost.tokens == most_merged.tokens
    assert cost.macs_after == most_merged.macs_after, "the least is what ToMe spends that merges as much"
    matching = 6 * 50 * 50 * (64 // 2)  # 100 patches, 32 channels a head
    assert cost.macs_most == cost.macs_before + matching
    assert "the images decide" in str(cost)
    more = 100 * matching / cost.macs_before
    assert f"an image of which nothing merges costs {cost.macs_most / 5e8:.2f} GFLOPs, {more:.1f} % more than" in str(
        cost
    )
    values = json.loads(json.dumps(cost.to_dict()))
    assert (values["exact"], values["macs_most"]) == (False, cost.macs_most)
    assert most_merged.exact
    assert "decide" not in str(most_merged)
    assert json.loads(json.dumps(most_merged.to_dict()))["exact"] is True
    assert vtoken.report(model, ThresholdMerge(threshold=1.0)).macs_after == cost.macs_before
    both = [ThresholdMerge(), vtoken.Sparsifiner(keep_ratio=0.5)]
    sparse = vtoken.report(timm.create_model("test_vit"), both)
    assert sparse.macs_most is not None
    assert sparse.macs_after < sparse.macs_most


def test_there_is_no_one_number_of_tokens() -> None:
    model = timm.create_model("test_vit")
    with pytest.raises(ConfigError, match=r"num_tokens cannot be told .* 3 to 101 tokens leave the last block"):
        vtoken.num_tokens(model, ThresholdMerge())
    assert vtoken.num_tokens(model, ThresholdMerge(layers=())) == 101


def test_graphs_are_refused_and_say_why() -> None:
    row = Host("shallow", lambda: vit(depth=1))
    model, x = vtoken.apply(row.model(), ThresholdMerge(threshold=0.6)), row.images()
    why = "ThresholdMerge lets the images decide how many tokens merge"
    with pytest.raises(ConfigError, match="counts that shapes tell"):
        vtoken.compile(model)
    with pytest.raises(ConfigError, match=why):
        torch.export.export(model, (x,), strict=False)
    with pytest.raises(ConfigError, match=why), pytest.warns():
        torch.jit.trace(model, (x,))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=why):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager")(x), model(x))
    # What torch learned there, it goes by for other models: it begins in the middle of one.
    other = vtoken.apply(row.model(), ThresholdMerge(threshold=0.7))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="decide how many tokens merge, which no single graph"):
        torch.compile(other, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()


def test_a_prompt_of_a_llava_cannot_be_sized() -> None:
    pytest.importorskip("transformers")
    from tests.hosts import llavas

    model = llavas.build("llava")
    with pytest.raises(ConfigError, match="one placeholder per image token"):
        vtoken.apply(model, ThresholdMerge())
    assert not vtoken.is_applied(model)
    inner = model.model.vision_tower
    vtoken.apply(inner, ThresholdMerge())  # the tower by itself is a tower
    with pytest.raises(ConfigError, match="cannot be told before the images are seen"):
        vtoken.num_tokens(model, [ThresholdMerge(), vtoken.VTCCLS(num_tokens=3)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Undeclared(vtoken.MergeConfig):
    """Merges what is alike and says nothing about it."""

    method = "undeclared"

    def amounts(self, depth: int) -> tuple[int, ...]:
        return (8,) * depth

    def removed(self, amount: int, mergeable: int) -> int:
        return min(amount, mergeable // 2)

    def match(self, layer: int, depth: int, metric: Tensor, r: int, num_prefix: int, protect: Any) -> Any:
        return plan_threshold(metric, r, threshold=0.98, num_prefix=num_prefix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared(Undeclared):
    """The same with the one line that it lacked."""

    exact = False


class TooMany(Undeclared):
    """Removes one more than it may."""

    exact = False

    def match(self, layer: int, depth: int, metric: Tensor, r: int, num_prefix: int, protect: Any) -> Any:
        return plan_tome(metric, r + 1, num_prefix=num_prefix)


def test_a_count_that_is_not_kept_is_an_error_and_a_declared_one_is_not() -> None:
    row = host("vit_token")
    model, x = row.model(), row.images()
    said = r"Undeclared.match removed \d tokens in block 0, `removed` said 8: .* `exact = False`"
    with vtoken.applied(model, Undeclared()), pytest.raises(vtoken.VTokenError, match=said):
        run(model, x)
    with vtoken.applied(model, TooMany()), pytest.raises(vtoken.VTokenError, match="at most 8"):
        run(model, x)
    with vtoken.applied(model, Declared()):
        tokens = tuple(traced(model, x)[1].tokens)
        plan, cost = vtoken.plan(model), vtoken.report(model)
    assert not plan.exact
    assert all(low <= n <= high for low, n, high in zip(plan.least, tokens, plan.tokens, strict=True))
    assert cost.macs_most is not None
    assert cost.macs_after < cost.macs_most


# --- settings ---


def test_settings() -> None:
    assert ThresholdMerge() == ThresholdMerge(threshold=0.9, ratio=0.5)
    assert ThresholdMerge(r=3).ratio is None
    config = ThresholdMerge(threshold=[0.5, 0.6], r=(4, -1.0))
    assert vtoken.config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert copy.deepcopy(config) == config
    assert hash(config) == hash(copy.copy(config))
    assert "threshold_merge" in vtoken.methods()
    for wrong in (1.01, -1.5, "0.9", None, True, math.nan, [0.5, 2]):
        with pytest.raises(ConfigError, match="threshold"):
            ThresholdMerge(threshold=wrong)
    with pytest.raises(ConfigError, match=r"threshold=\[2 values\].*give one per block"):
        vtoken.plan(timm.create_model("test_vit"), ThresholdMerge(threshold=[0.5, 0.6]))


def test_the_layer_of_ones_own_network() -> None:
    merge = vtoken.nn.MergeTokens(ThresholdMerge(threshold=0.9), num_prefix=1)
    metric, x = clustered(0, 2, 31), torch.randn(2, 31, 8)
    y, size = merge(x, metric)
    assert 16 <= y.shape[1] < 31
    assert size.sum(1).tolist() == [31, 31]
    same, ones = vtoken.nn.MergeTokens(ThresholdMerge(threshold=0.9999))(x, metric)
    assert same is x
    assert torch.equal(ones, torch.ones(2, 31))


def test_bench_counts_what_the_images_gave() -> None:
    from vtoken.accounting import compare

    row = Host("rope", host("eva02").build)
    model, x = row.model(), row.images(batch=2)
    config = ThresholdMerge(threshold=0.65)
    found = compare.compare(model, [config, ThresholdMerge(threshold=0.9999, r=3)], x, rounds=1)
    with vtoken.applied(model, config):
        tokens = traced(model, x)[1].tokens
    assert found[1].tokens == tokens[-1] < tokens[0]
    assert found[2].tokens == tokens[0]
    assert 0.9 < found[2].flops_factor < 1, "only the matching is spent"
    assert 1 < found[1].flops_factor < vtoken.report(model, config).flops_factor
