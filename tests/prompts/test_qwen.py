"""Images and videos of the Qwen-VL models: as full prompts in which dropped tokens are masked."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
from tests.helpers import assert_close

transformers = pytest.importorskip("transformers")

from tests.prompts.qwens import ATTENTION, COUNTS, GLM, IMAGE, KINDS, VIDEO, build, call, fed, masked, row_of  # noqa: E402

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
#: Whether this release's models take features that are ready.
READY = "mm_encoder_outputs" in inspect.signature(transformers.Qwen2VLForConditionalGeneration.forward).parameters
METHODS = [
    vtoken.VTCCLS(num_tokens=3), vtoken.DivPrune(keep_ratio=0.5), vtoken.CDPruner(num_tokens=2),
    vtoken.RandomTokens(num_tokens=3, seed=4), vtoken.UniformTokens(num_tokens=3),
]  # fmt: skip


@pytest.mark.parametrize("kind", [*KINDS, *GLM])
@pytest.mark.parametrize("pad", ["left", "right"])
@torch.no_grad()
def test_keeping_all_changes_no_bit(kind: str, pad: str) -> None:
    model, given = build(kind), call(pad=pad, video=kind in KINDS, kind=kind)
    stock = model(**given).logits
    other = model(**given | {"pixel_values": given["pixel_values"].flip(0)}).logits
    assert float((other - stock).abs().max()) > 0.3, "the image was to matter"
    ids = model.generate(**given, **GREEDY) if pad == "left" else None
    inner, attributes = type(model.model), _attributes(model.model.visual)
    for config in (vtoken.VTCCLS(keep_ratio=1.0), vtoken.VisionZip(keep_ratio=1.0, contextual=0)):
        vtoken.apply(model, config)
        assert torch.equal(model(**given).logits, stock)
        assert torch.equal(vtoken.trace(model, **given)[0].logits, stock), "features handed over"
        assert ids is None or torch.equal(model.generate(**given, **GREEDY), ids)
        vtoken.remove(model)
    assert type(model.model) is inner
    assert _attributes(model.model.visual) == attributes
    assert torch.equal(model(**given).logits, stock)


def _attributes(tower: Any) -> list[str]:
    """Without the library's note that it has installed its recording hooks."""
    return sorted(name for name in vars(tower) if not name.startswith("_output_capturing"))


@pytest.mark.parametrize("kind", [*ATTENTION, "glm4v"])
@torch.no_grad()
def test_hooks_of_the_tower_get_its_own_modules(kind: str) -> None:
    model, given = build(kind), call()
    names, seen = {m: n for n, m in model.named_modules()}, list[str]()
    tower = [m for n, m in model.named_modules() if n.startswith("model.visual")]
    for module in tower:
        module.register_forward_hook(lambda m, *_: seen.append(names[m]))
    model(**given)
    stock, _ = set(seen), seen.clear()
    for config in (vtoken.VTCCLS(num_tokens=3), vtoken.VisionZip(num_tokens=3)):
        vtoken.apply(model, config)
        model(**given)
        assert set(seen) == stock
        vtoken.remove(model)
        seen.clear()


@pytest.mark.parametrize("kind", [*ATTENTION, *GLM])
@pytest.mark.parametrize("config", METHODS, ids=lambda c: c.method)
@torch.no_grad()
def test_pruned_is_the_full_prompt_with_masked_keys(kind: str, config: Any) -> None:
    model, given = build(kind), call()
    vtoken.apply(model, config)
    out, trace = vtoken.trace(model, **given)
    right = vtoken.trace(model, **call(pad="right"))[0]
    ids = model.generate(**given, **GREEDY)
    kept = trace.prompt.kept
    vtoken.remove(model)
    assert torch.equal(ids[:, :-4], given["input_ids"])
    for row in range(2):
        mine = kept[:2] if row == 0 else kept[2:]
        logits, new = masked(model, row_of(given, row), [k.cpu() for k in mine], new=4)
        seen = trace.prompt.index[row] >= 0
        assert_close("logits", logits, out.logits[row][seen], 2e-5)
        assert_close("right padding", logits, right.logits[row][: len(logits)], 2e-5)
        assert ids[row, -4:].tolist() == new
    assert any(len(k) < n for k, n in zip(kept, COUNTS, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_images_and_videos_of_one_call_are_hand_fed_rows(kind: str) -> None:
    model, given = build(kind), call(video=True, kind=kind)
    vtoken.apply(model, vtoken.VTCCLS(keep_ratio=0.5))
    out, trace = vtoken.trace(model, **given)
    assert [v.kind for v in trace.prompt.visuals] == ["image", "image", "video", "image"], "in prompt order"
    kept = trace.prompt.kept
    assert [len(k) for k in kept] == [3, 4, 6, 2]
    vtoken.remove(model)
    chosen: list[dict[str, list[Tensor]]] = [
        {"image": list(kept[:2]), "video": []}, {"image": [kept[3]], "video": [kept[2]]}
    ]  # fmt: skip
    for row in range(2):
        logits = fed(model, row_of(given, row, video=True), chosen[row])
        seen = trace.prompt.index[row] >= 0
        assert_close("logits", logits, out.logits[row][seen], 2e-5)


@pytest.mark.parametrize("kind", [*KINDS, "glm4v"])
@torch.no_grad()
def test_scores_are_the_attention_that_a_token_gets(kind: str) -> None:
    """Eager maps in float64 of each image alone, summed up by hand."""
    model, given = build(kind), call()
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=3))
    scores = vtoken.trace(model, **given)[1].prompt.scores
    vtoken.remove(model)
    tower = model.model.visual.double()
    attn = tower.blocks[-1].attn
    maps: list[Tensor] = []

    def eager(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **kw: Any) -> Any:
        weights = (q @ k.transpose(2, 3) * kw["scaling"]).softmax(-1)
        maps.append(weights[0].mean((0, 1)))
        return (weights @ v).transpose(1, 2), None

    transformers.AttentionInterface.register("test_maps", eager)
    attn.config = type(attn.config)(**attn.config.to_dict())
    attn.config._attn_implementation_internal = "test_maps"
    at = 0
    for i, (t, h, w) in enumerate(given["image_grid_thw"].tolist()):
        maps.clear()
        tower(given["pixel_values"][at : at + t * h * w].double(), grid_thw=torch.tensor([[t, h, w]]))
        at += t * h * w
        found = maps[-1].unflatten(0, (-1, 4)).mean(1)
        if kind == "qwen2_5":  # the tower works window by window: 2 x 2 tokens each
            rows, columns = h // 2, w // 2
            order = [
                r * columns + c
                for top in range(0, rows, 2)
                for left in range(0, columns, 2)
                for r in range(top, min(top + 2, rows))
                for c in range(left, min(left + 2, columns))
            ]
            raster = torch.empty_like(found)
            raster[torch.tensor(order)] = found
            found = raster
        assert_close("scores", found.float(), scores[i], 1e-6)


@pytest.mark.parametrize("kind", ["qwen2_5", "qwen3", "qwen3_5", "glm4v"])
@torch.no_grad()
def test_beams_static_caches_and_chunks_with_unequal_counts(kind: str) -> None:
    model, given = build(kind), call()
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=3))
    beams = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    with vtoken.budget(model, num_tokens=[2, 5, 1]):
        greedy, together = model.generate(**given, **GREEDY), model.generate(**given, **beams)
        if kind != "qwen3_5":
            assert torch.equal(model.generate(**given, **GREEDY, cache_implementation="static"), greedy)
            if READY:
                assert torch.equal(model.generate(**given, **GREEDY, prefill_chunk_size=5), greedy)
            else:
                with pytest.raises(vtoken.InputError, match="prefill_chunk_size"):
                    model.generate(**given, **GREEDY, prefill_chunk_size=5)
        assert torch.equal(model.generate(**given, **GREEDY, use_cache=False), greedy)
    for row, budget in ((0, [2, 5]), (1, [1])):
        with vtoken.budget(model, num_tokens=budget):
            alone = row_of(given, row)
            assert torch.equal(model.generate(**alone, **GREEDY)[:, -4:], greedy[row : row + 1, -4:])
            assert torch.equal(model.generate(**alone, **beams)[:, -4:], together[2 * row : 2 * row + 2, -4:])


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_5", "qwen3", "glm4v", "glm46v"])
@torch.no_grad()
def test_a_second_turn_after_somebody_elses_call(kind: str) -> None:
    model, given = build(kind), row_of(call(), 0)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=2))
    first, trace = vtoken.trace(model, **given)
    cache = getattr(first, "cache", None) or first.past_key_values
    more = torch.tensor([[11, 12, 13]])
    model(**row_of(call(seed=3), 1))  # leaves an offset of its own
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    second = model(input_ids=more, **{name: cache}).logits
    vtoken.remove(model)
    full = dict(given)
    full["input_ids"] = torch.cat([given["input_ids"], more], 1)
    full["mm_token_type_ids"] = torch.cat([given["mm_token_type_ids"], torch.zeros_like(more)], 1)
    whole, _ = masked(model, full, list(trace.prompt.kept))
    assert_close("second turn", whole[-3:], second[0], 2e-5)


def test_labels_and_gradients() -> None:
    model, given = build("qwen3"), call(pad="right")
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    vtoken.apply(model, vtoken.DivPrune(num_tokens=2))
    out, trace = vtoken.trace(model, **given, labels=labels)
    index = trace.prompt.index
    short = labels.gather(1, index.clamp_min(0)).masked_fill(index < 0, -100)
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), short[:, 1:].flatten())
    assert_close("loss", loss, out.loss, 1e-5)
    out.loss.backward()
    assert float(model.model.visual.merger.linear_fc2.weight.grad.abs().sum()) > 0


@torch.no_grad()
def test_threads_with_budgets_of_their_own() -> None:
    model, given = build("qwen2_5"), call()
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    expected = []
    for n in (1, 2, 3, 4):
        with vtoken.budget(model, num_tokens=n):
            expected.append((model(**given).logits, model.generate(**given, **GREEDY)))
    found: dict[int, Any] = {}

    def work(n: int) -> None:
        with torch.no_grad(), vtoken.budget(model, num_tokens=n):
            for _ in range(3):
                found[n] = (model(**given).logits, model.generate(**given, **GREEDY))

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in (1, 2, 3, 4):
        assert torch.equal(found[n][0], expected[n - 1][0])
        assert torch.equal(found[n][1], expected[n - 1][1])


def test_what_is_refused() -> None:
    model, given = build("qwen2_5"), call()
    for config, message in [
        (vtoken.VTCCLS(num_tokens=3, positions="compact"), "three"),
        (vtoken.VTCCLS(num_tokens=3, scorer="cls"), "no class token"),
        (vtoken.VTCCLS(num_tokens=3, start_layer=0), "windows"),
    ]:
        with pytest.raises(vtoken.ConfigError, match=message):
            vtoken.apply(model, config)
        assert not vtoken.is_applied(model)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=3))
    ran: list[int] = []
    model.model.visual.patch_embed.register_forward_pre_hook(lambda *_: ran.append(1))
    without = {name: value for name, value in given.items() if name != "image_grid_thw"}
    with pytest.raises(vtoken.InputError, match="image_grid_thw"):
        model(**without)
    grids = torch.tensor([[1, 8, 6], [1, 8, 4], [1, 4, 4]])
    larger = {"image_grid_thw": grids, "pixel_values": torch.randn(96, 96)}
    with pytest.raises(vtoken.ShapeError, match=r"18 image placeholders.* 24 features, 9 of them"):
        model(**given | larger)
    with pytest.raises(vtoken.ShapeError, match=r"71 patches.* 72"):
        model(**given | {"pixel_values": given["pixel_values"][:-1]})
    with pytest.raises(vtoken.InputError, match="2 values for 3"), vtoken.budget(model, num_tokens=[1, 2]):
        model(**given)
    assert not ran, "all of it before the tower"
    model(**given)
    assert ran == [1], "the tower runs once"
    with pytest.raises(vtoken.InputError, match="base_model"):
        model.model(**given)
    assert vtoken.num_tokens(model, img_size=(32, 48)) == 3
    with pytest.raises(vtoken.ShapeError, match="any size"):
        vtoken.num_tokens(model)


def test_what_a_prompt_costs() -> None:
    """Against the products that a counting tower makes, one image alone."""
    from torch.utils.flop_counter import FlopCounterMode

    for kind, pixels in (("qwen2", (16, 24)), ("qwen2_5", (24, 40)), ("qwen3", (16, 24)), ("glm4v", (16, 24))):
        model, (h, w) = build(kind), (pixels[0] // 4, pixels[1] // 4)
        model.set_attn_implementation("eager")
        report = vtoken.prompt_report(model, vtoken.DivPrune(num_tokens=2), image_size=pixels, text_tokens=10)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.model.get_image_features(torch.randn(h * w, 96), torch.tensor([[1, h, w]]))
        expected = counter.get_total_flops() // 2
        assert report.before.tower_macs + report.before.projector_macs == expected
        assert (report.before.image_tokens, report.after.image_tokens) == (h * w // 4, 2)
        assert report.exact
        assert report.prefill_factor > 1


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_5", "qwen3_5"])
@torch.no_grad()
def test_the_route_of_older_releases(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where forward takes no ready outputs, features enter as embeddings: the same logits and ids."""
    from vtoken.prompts import family

    model, given = build(kind), call(video=True, kind=kind)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=3))
    beams = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    with vtoken.budget(model, num_tokens=[2, 3, 1, 4]):
        new = [model(**given).logits, model.generate(**given, **GREEDY), model.generate(**given, **beams)]
        monkeypatch.setattr(family, "takes_outputs", lambda _: False)
        old = [model(**given).logits, model.generate(**given, **GREEDY), model.generate(**given, **beams)]
        with pytest.raises(vtoken.InputError, match="prefill_chunk_size"):
            model.generate(**given, **GREEDY, prefill_chunk_size=5)
    assert all(torch.equal(a, b) for a, b in zip(new, old, strict=True))


@torch.no_grad()
def test_kept_tokens_can_be_drawn() -> None:
    model, given = build("qwen2"), call()
    vtoken.apply(model, vtoken.DivPrune(num_tokens=3))
    _, trace = vtoken.trace(model, **given)
    assert trace.grid == (2, 3)
    for i, (_, h, w) in enumerate(given["image_grid_thw"].tolist()):
        assert trace.kept(i).tolist() == trace.prompt.kept[i].tolist()
        assert trace.prompt.visuals[i].cells[0].grid == (h // 2, w // 2)
    pytest.importorskip("PIL")
    assert vtoken.visualize.draw_kept(torch.rand(3, 16, 24), trace.kept(0), trace.grid).size == (24, 16)


@torch.no_grad()
def test_videos_of_glm_run_whole_with_a_word() -> None:
    """They have the placeholders of images, which the library itself takes for one or the other."""
    model, given = build("glm4v"), call()
    video = {"pixel_values_videos": given["pixel_values"], "video_grid_thw": given["image_grid_thw"]}
    rest = {n: v for n, v in given.items() if n not in ("pixel_values", "image_grid_thw")}
    rest["mm_token_type_ids"] = rest["mm_token_type_ids"] * 2
    stock = model(**rest, **video).logits
    vtoken.apply(model, vtoken.DivPrune(num_tokens=3))
    with pytest.warns(vtoken.VTokenWarning, match="does not prune video tokens"):
        assert torch.equal(model(**rest, **video).logits, stock)


@torch.no_grad()
def test_a_video_budget_beside_pruned_images() -> None:
    """Each kind gets what its own method gives it alone, and positions stay those of the full prompt."""
    model, given = build("qwen2"), call(video=True)
    alone = vtoken.QuotaVideoModel(model, budget=4)
    scores = [1.0, 0.5]
    plain = alone.prepare(**given, frame_scores=scores)
    quota = vtoken.QuotaVideoModel(vtoken.apply(model, vtoken.DivPrune(num_tokens=3)), budget=4)
    images = [v.rows for v in vtoken.encode_images(model, given) if v.kind == "image"]
    with vtoken.tracing(quota) as record:
        out = quota(**given, frame_scores=scores)
    video, ids = model.config.video_token_id, record.video.input_ids
    assert int((ids == video).sum()) == int((plain["input_ids"] == video).sum()) == 4
    call_ = quota.prepare(**given, frame_scores=scores)
    assert torch.equal(call_["input_ids"], ids)
    if "mm_encoder_outputs" in call_:
        rows = call_["mm_encoder_outputs"]
        assert all(torch.equal(a, b) for a, b in zip(rows["image"].pooler_output, images, strict=True))
        whole = plain["mm_encoder_outputs"]["video"].pooler_output
        assert torch.equal(torch.cat(list(rows["video"].pooler_output)), torch.cat(list(whole)))
    full = model.model.get_rope_index(
        given["input_ids"], mm_token_type_ids=given["mm_token_type_ids"], image_grid_thw=given["image_grid_thw"],
        video_grid_thw=given["video_grid_thw"], attention_mask=given.get("attention_mask"),
    )[0]  # fmt: skip
    at = record.video.index
    assert torch.equal(
        call_["position_ids"][1:][:, at >= 0], full.gather(2, at.clamp_min(0).expand(3, -1, -1))[:, at >= 0]
    )
    assert out.logits.shape[1] == ids.shape[1]
    new = quota.generate(**given, frame_scores=scores, max_new_tokens=3, do_sample=False)
    assert torch.equal(new[:, :-3], given["input_ids"])
