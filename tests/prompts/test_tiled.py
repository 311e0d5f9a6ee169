"""Families whose towers see tiles, or rows of patches under a mask: as prompts into which kept rows are put by hand."""

from __future__ import annotations

import contextlib
import inspect
import re
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
import vtoken.testing
from tests.helpers import assert_close

transformers = pytest.importorskip("transformers")

from tests.hosts import llavas  # noqa: E402
from tests.prompts import tiled  # noqa: E402
from tests.prompts.tiled import IMAGE, KINDS, SIDE, SIZE, TILES, alone, build, call, features, fed, sizes  # noqa: E402

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE]}
BEAMS = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
#: Whose image tokens see each other, so that a chunk of a prompt lacks the rest of its image.
BOTH_WAYS = ("gemma3", "paligemma")
ready = pytest.mark.skipif(not tiled.takes_outputs(), reason="this release takes no ready outputs")


def of_row(kind: str, values: Any, row: int) -> list[Any]:
    """Of what is listed by image, that of one row."""
    each = [len(r) if kind in SIDE or kind not in ("gemma3", "paligemma") else sum(r) for r in TILES]
    each = [len(r) for r in TILES] if kind == "paligemma" else each
    start = sum(each[:row])
    return list(values)[start : start + each[row]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad", ["left", "right"])
@torch.no_grad()
def test_keeping_all_changes_no_bit(kind: str, pad: str) -> None:
    model, given = build(kind), call(kind, pad)
    before, stock = {n: type(m) for n, m in model.named_modules()}, model(**given).logits
    other = model(**given | {"pixel_values": given["pixel_values"].flip(-1)}).logits
    assert float((other - stock).abs().max()) > 0.1 * float(stock.abs().max()), "the image was to matter"
    ids = model.generate(**given, **GREEDY)
    with vtoken.applied(model, vtoken.VTCCLS(keep_ratio=1.0)):
        assert torch.equal(model(**given).logits, stock)
        assert torch.equal(model.generate(**given, **GREEDY), ids)
        assert torch.equal(vtoken.trace(model, **given)[0].logits, stock), "features handed over"
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert torch.equal(model(**given).logits, stock)
    half = model.bfloat16()
    floats = {n: v.bfloat16() if v.is_floating_point() else v for n, v in given.items()}
    stock = half(**floats).logits
    with vtoken.applied(half, vtoken.VTCCLS(keep_ratio=1.0)):
        assert torch.equal(vtoken.trace(half, **floats)[0].logits, stock)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "config",
    [vtoken.VTCCLS(num_tokens=4), vtoken.DivPrune(keep_ratio=0.4, space="before"), vtoken.CDPruner(num_tokens=2),
     vtoken.RandomTokens(num_tokens=3, seed=4, positions="original")],
    ids=lambda c: c.method,
)  # fmt: skip
@torch.no_grad()
def test_pruned_is_hand_fed(kind: str, config: Any) -> None:
    model, given = build(kind), call(kind)
    rows, original = features(kind, model, given), config.positions == "original"
    with vtoken.applied(model, config):
        out, trace = vtoken.trace(model, **given)
        right = vtoken.trace(model, **call(kind, "right"))[0].logits
        told = model.generate(**given, **GREEDY, output_logits=True, return_dict_in_generate=True)
        finals = vtoken.encode_images(model, given)
    record = trace.prompt
    assert list(record.full_lengths) == sizes(kind)
    assert all(len(k) < n or n <= 4 for k, n in zip(record.kept, sizes(kind), strict=True))
    for final, own, kept in zip(finals, rows, record.kept, strict=True):
        assert_close("final rows", own[kept], final.rows, 1e-6)
    for row in range(len(TILES)):
        mine = [k.tolist() for k in of_row(kind, record.kept, row)]
        logits, steps = fed(
            kind, model, alone(kind, given, row), of_row(kind, rows, row), mine, original=original,
            new=4,
        )  # fmt: skip
        seen = record.index[row] >= 0
        assert_close("logits", logits, out.logits[row][seen], 1e-5)
        assert_close("right padding", logits, right[row][: len(logits)], 1e-5)
        assert_close("generated", steps, torch.stack([step[row] for step in told.logits]), 1e-5)
    assert torch.equal(told.sequences[:, :-4], given["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_beams_static_caches_and_chunks_with_unequal_counts(kind: str) -> None:
    model, given = build(kind), call(kind)
    counts = [1 + (3 * i + 1) % 4 for i in range(len(sizes(kind)))]
    assert len(set(counts)) > 1
    vtoken.apply(model, vtoken.DivPrune(num_tokens=4))
    with vtoken.budget(model, num_tokens=counts):
        greedy, together = model.generate(**given, **GREEDY), model.generate(**given, **BEAMS)
        assert torch.equal(model.generate(**given, **GREEDY, cache_implementation="static"), greedy)
        if kind != "paligemma" or tiled.takes_outputs():  # older releases take new tokens for a part of the prefix
            assert torch.equal(model.generate(**given, **GREEDY, use_cache=False), greedy)
        if tiled.takes_outputs() and kind not in BOTH_WAYS:  # a chunk of those does not see the rest of its image
            assert torch.equal(model.generate(**given, **GREEDY, prefill_chunk_size=7), greedy)
    for row in range(len(TILES)):
        if not TILES[row]:
            single = model.generate(**alone(kind, given, row), **BEAMS)
            assert torch.equal(single[:, -4:], together[2 * row : 2 * row + 2, -4:])
            continue
        with vtoken.budget(model, num_tokens=of_row(kind, counts, row)):
            one = alone(kind, given, row)
            assert torch.equal(model.generate(**one, **GREEDY)[:, -4:], greedy[row : row + 1, -4:])
            assert torch.equal(model.generate(**one, **BEAMS)[:, -4:], together[2 * row : 2 * row + 2, -4:])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_second_turn_after_somebody_elses_call(kind: str) -> None:
    model, given = build(kind), alone(kind, call(kind), 0)
    rows = features(kind, model, given, TILES[:1])
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=2))
    first, trace = vtoken.trace(model, **given)
    cache = getattr(first, "cache", None) or first.past_key_values
    model(**alone(kind, call(kind, seed=5), 2))
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    more = (11, 12, 13)
    second = model(input_ids=torch.tensor([more]), **{name: cache}).logits[0]
    with pytest.raises(vtoken.InputError, match=r"(?s)cache"):
        model(**given, **{name: cache})
    vtoken.remove(model)
    whole, _ = fed(kind, model, given, rows, [k.tolist() for k in trace.prompt.kept], more=more)
    assert_close("second turn", whole[-3:], second, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scores_are_the_attention_that_a_token_gets(kind: str) -> None:
    """Eager maps of every tile or image alone; parts of a tile that are padding get none."""
    model, given = build(kind), call(kind)
    with vtoken.applied(model, vtoken.VTCCLS(num_tokens=2, start_layer=1)):
        scores = torch.cat(vtoken.trace(model, **given)[1].prompt.scores)
    tower = model.model.vision_model if kind in ("smolvlm", "idefics3") else model.model.vision_tower
    tower.set_attn_implementation("eager")
    pixels, masks = given["pixel_values"], given.get("pixel_attention_mask")
    if masks is not None:
        there = pixels.flatten(2).abs().sum(2) > 0
        pixels, masks = pixels[there], masks[there]
    found = []
    for i, image in enumerate(pixels):
        one: dict[str, Any] = {"pixel_values": image[None]}
        grid, side = (6, 6), 1 if kind in ("paligemma", "llava_pixtral") else 2
        if masks is not None:
            one["patch_attention_mask"] = masks[i][None, ::4, ::4] > 0
        if kind in SIDE:
            one["image_sizes"] = given["image_sizes"][i : i + 1]
            grid = tuple((given["image_sizes"][i] // 4).tolist())
        maps = tower(**one, output_attentions=True).attentions
        mean = torch.stack([m.double().mean((1, 2))[0] for m in maps[1:4]]).mean(0).view(grid)
        if masks is not None and not bool(masks[i].all()):
            assert float(mean[:, 5:].max()) == 0, "padding of a tile"
        found += [
            mean[r : r + side, c : c + side].mean() for r in range(0, grid[0], side) for c in range(0, grid[1], side)
        ]
    assert_close("scores", torch.stack(found), scores, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_in_front_of_the_projector_are_projected_as_it_does(kind: str) -> None:
    """VisionZip without means keeps rows that it has projected itself: those of the model, to rounding."""
    model, given = build(kind), call(kind)
    rows = features(kind, model, given)
    with vtoken.applied(model, vtoken.VisionZip(num_tokens=5, contextual=0)):
        finals = vtoken.encode_images(model, given)
    for own, final in zip(rows, finals, strict=True):
        assert_close("projected", own[final.kept], final.rows, 2e-5)
    with vtoken.applied(model, vtoken.VisionZip(num_tokens=4, contextual=2)):
        merged = vtoken.encode_images(model, given)
        assert [len(f.rows) for f in merged] == [
            sum(min(4, c.tokens) for c in v.cells) for v in vtoken.trace(model, **given)[1].prompt.visuals
        ]
    assert any(not torch.allclose(own[f.kept], f.rows, atol=1e-3) for own, f in zip(rows, merged, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_labels_and_gradients(kind: str) -> None:
    model, given = build(kind), call(kind, "right")
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    vtoken.apply(model, vtoken.DivPrune(num_tokens=2))
    out, trace = vtoken.trace(model, **given, labels=labels)
    index = trace.prompt.index
    short = labels.gather(1, index.clamp_min(0)).masked_fill(index < 0, -100)
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), short[:, 1:].flatten())
    assert_close("loss", loss, out.loss, 1e-5)
    out.loss.backward()
    name = "connector" if kind in ("smolvlm", "idefics3") else "multi_modal_projector"
    grads = [p.grad for p in getattr(model.model, name).parameters() if p.dim() == 2]
    assert all(g is not None and float(g.abs().sum()) > 0 for g in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_the_promises_of_a_family(kind: str) -> None:
    vtoken.testing.check_family(build(kind), call(kind))


@pytest.mark.parametrize("kind", ["smolvlm", "idefics3", "aya", "cohere2"])
@torch.no_grad()
def test_tiles_are_told_apart_by_the_token_in_front(kind: str) -> None:
    """Images that follow each other, cut or not; in a prompt without names every tile is an image."""
    model = build(kind)
    vtoken.apply(model, vtoken.UniformTokens(num_tokens=3))
    tiles = ((3, 1, 2), (1, 1), (2,))
    given = call(kind, tiles=tiles)
    record = vtoken.trace(model, **given)[1].prompt
    assert [len(v.cells) for v in record.visuals] == [3, 1, 2, 1, 1, 2]
    assert record.lengths == (9, 3, 6, 3, 3, 6)
    assert [v.cells[-1].role for v in record.visuals] == ["overview", "image", "overview", "image", "image", "overview"]
    picked = (record.kept[0] >= 18).nonzero()[:, 0]
    assert record.patches(0).tolist() == (record.kept[0][picked] - 18).tolist(), "those of the tile that shows it all"
    ids, end = given["input_ids"], 23
    nameless = given | {"input_ids": ids.masked_fill((ids >= 20) & (ids <= end), 5)}
    cells = [len(v.cells) for v in vtoken.trace(model, **nameless)[1].prompt.visuals]
    assert cells == [1] * 10, "where nothing tells them apart"
    # A prompt that is short already has a run a tile and means the same.
    short = {"input_ids": record.input_ids, "attention_mask": (record.index >= 0).long()}
    rest = {n: v for n, v in given.items() if n.startswith("pixel")}
    assert_close("short", model(**given).logits, model(**short, **rest).logits, 1e-6)


@torch.no_grad()
def test_a_window_counts_places_of_the_short_prompt() -> None:
    """Sliding layers of Gemma 3 see further back in the text the more is dropped: as in the prompt put in by hand."""
    model, given = build("gemma3", sliding_window=6), call("gemma3")
    rows = features("gemma3", model, given)
    for positions in ("compact", "original"):
        with vtoken.applied(model, vtoken.DivPrune(num_tokens=2, positions=positions)):
            out, trace = vtoken.trace(model, **given)
        for row in range(3):
            kept = [k.tolist() for k in of_row("gemma3", trace.prompt.kept, row)]
            logits, _ = fed("gemma3", model, alone("gemma3", given, row), of_row("gemma3", rows, row), kept,
                            original=positions == "original")  # fmt: skip
            assert_close("logits", logits, out.logits[row][trace.prompt.index[row] >= 0], 1e-5)


@torch.no_grad()
def test_images_of_gemma_keep_seeing_themselves() -> None:
    """Without token types the model is causal throughout, and so it stays."""
    model, given = build("gemma3"), call("gemma3")
    without = {n: v for n, v in given.items() if n != "token_type_ids"}
    with vtoken.applied(model, vtoken.DivPrune(num_tokens=4)):
        both, causal = model(**given).logits, model(**without).logits
    assert float((both - causal).abs().max()) > 1e-2 * float(both.abs().max())


@pytest.mark.parametrize("kind", ["smolvlm", "idefics3"])
@torch.no_grad()
def test_black_tiles_and_wrong_counts(kind: str) -> None:
    model, given = build(kind), call(kind)
    vtoken.apply(model, vtoken.DivPrune(num_tokens=4))
    ran: list[int] = []
    model.model.vision_model.register_forward_pre_hook(lambda *_: ran.append(1))
    black = given["pixel_values"].clone()
    black[0, 1] = 0
    with pytest.raises(vtoken.ShapeError, match=r"names 4 tile\(s\).* saw 3: a tile that is black"):
        model(**given | {"pixel_values": black})
    ran.clear()
    with pytest.raises(vtoken.ShapeError, match=r"row 0 .* 3 tiles \(9 each\).* room for 2"):
        model(**given | {n: given[n][:, :2] for n in ("pixel_values", "pixel_attention_mask")})
    with pytest.raises(vtoken.ShapeError, match=r"tiles are|are \(24, 24\), got \(24, 16\)"):
        model(**given | {"pixel_values": given["pixel_values"][..., :16]})
    with pytest.raises(vtoken.ShapeError, match=r"\[B, tiles, C, H, W\]"):
        model(**given | {"pixel_values": given["pixel_values"].flatten(0, 1)})
    assert not ran, "all of it before the tower"
    model(**given)
    assert ran == [1], "the tower runs once"


@pytest.mark.parametrize("kind", ["gemma3", "aya", "mistral3"])
@torch.no_grad()
def test_placeholders_that_do_not_fit(kind: str) -> None:
    model, given = build(kind), call(kind)
    vtoken.apply(model, vtoken.DivPrune(num_tokens=2))
    fewer = given["input_ids"].clone()
    fewer[0, (fewer[0] == IMAGE).nonzero()[0]] = 5
    total = sum(sizes(kind))
    with pytest.raises(vtoken.ShapeError, match=rf"{total - 1} image placeholders.* {total} features"):
        model(**given | {"input_ids": fewer})
    if kind == "mistral3":
        with pytest.raises(vtoken.InputError, match="image_sizes"):
            model(**{n: v for n, v in given.items() if n != "image_sizes"})
        with pytest.raises(vtoken.ShapeError, match="do not fit"):
            model(**given | {"image_sizes": given["image_sizes"] * 2})


def test_what_is_refused() -> None:
    for kind in KINDS:
        model = build(kind)
        with pytest.raises(vtoken.ConfigError, match="class token"):
            vtoken.apply(model, vtoken.VTCCLS(num_tokens=3, scorer="cls"))
        assert not vtoken.is_applied(model)
    for kind in ("gemma3", "paligemma", "aya", "cohere2"):
        model = build(kind)
        vtoken.apply(model.model.vision_tower, vtoken.PiToMe(ratio=0.9))
        with pytest.raises(vtoken.ConfigError, match=r"tower .* carries a method"):
            vtoken.apply(model, vtoken.DivPrune(num_tokens=3))
        vtoken.remove(model)
        vtoken.apply(model, vtoken.DivPrune(num_tokens=3))
        vtoken.apply(model.model.vision_tower, vtoken.PiToMe(ratio=0.9))
        with pytest.raises(vtoken.ConfigError, match=r"tower .* carries a method"):
            model(**call(kind))
    for kind in ("aya", "llava_pixtral"):
        model = build(kind)
        model.config.vision_feature_select_strategy = "default"
        with pytest.raises(vtoken.ConfigError, match="strategy"):
            vtoken.apply(model, vtoken.DivPrune(num_tokens=3))
    model = build("gemma3")
    model.model.vision_tower = torch.nn.Linear(2, 2)
    with pytest.raises(vtoken.UnsupportedModelError, match=r"(?s)tower is a Linear.*SiglipVisionModel"):
        vtoken.apply(model, vtoken.DivPrune(num_tokens=3))
    model = build("smolvlm")
    model.model.get_image_features = model.model.get_image_features
    with pytest.raises(vtoken.UnsupportedModelError, match="replaced on the instance"):
        vtoken.apply(model, vtoken.DivPrune(num_tokens=3))


@ready
@torch.no_grad()
def test_features_that_are_ready_run_unpruned_with_a_word() -> None:
    model, given = build("idefics3"), call("idefics3")
    out = model.model.get_image_features(given["pixel_values"], given["pixel_attention_mask"], return_dict=True)
    text = {n: given[n] for n in ("input_ids", "attention_mask")}
    stock = model(**given).logits
    with vtoken.applied(model, vtoken.DivPrune(num_tokens=3)):
        with pytest.warns(vtoken.VTokenWarning, match="runs unpruned"):
            assert torch.equal(model(**text, mm_encoder_outputs={"image": out}).logits, stock)
        # Rows alone, which some releases take: what comes of them is the library's.
        with pytest.warns(vtoken.VTokenWarning, match="runs unpruned"), contextlib.suppress(AttributeError):
            model(**text, mm_encoder_outputs=torch.cat(list(out.pooler_output)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_prompt_costs(kind: str) -> None:
    """Against the products that a counting tower makes, one image alone."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build(kind)
    tower = model.model.vision_model if kind in ("smolvlm", "idefics3") else model.model.vision_tower
    tower.set_attn_implementation("eager")
    size = (16, 24) if kind in SIDE else (24, 24)
    report = vtoken.prompt_report(model, vtoken.DivPrune(num_tokens=2), image_size=size, text_tokens=10)
    one: dict[str, Tensor] = {"pixel_values": torch.randn(1, 3, *size)}
    one |= {"image_sizes": torch.tensor([size])} if kind in SIDE else {}
    if kind in ("smolvlm", "idefics3"):
        one = {"pixel_values": one["pixel_values"][None]}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.get_image_features(**one)
    expected = counter.get_total_flops() // 2
    if kind in SIDE:  # older releases make angles by a product
        expected = pytest.approx(expected, rel=2e-4)
    assert report.before.tower_macs + report.before.projector_macs == expected
    full = 24 * 16 // SIDE[kind] ** 2 if kind in SIDE else SIZE[kind]
    assert (report.before.image_tokens, report.after.image_tokens) == (full, 2)
    assert report.exact
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=2))
    assert vtoken.num_tokens(model, img_size=size) == 2
    cut = {"smolvlm": 5, "idefics3": 5, "aya": 5, "cohere2": 5}.get(kind, 1)
    if kind not in SIDE:
        assert vtoken.num_tokens(model) == 2
        assert vtoken.num_tokens(model, img_size=(48, 48)) == 2 * cut


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_kept_tokens_can_be_drawn(kind: str) -> None:
    pytest.importorskip("PIL")
    model, given = build(kind), call(kind)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=3))
    _, trace = vtoken.trace(model, **given)
    for i, visual in enumerate(trace.prompt.visuals):
        grid = visual.cells[-1].grid
        kept = trace.kept(i)
        assert 0 < len(kept) <= 3
        vtoken.visualize.draw_kept(torch.rand(3, 24 * grid[0], 24 * grid[1]), kept, grid)


@torch.no_grad()
def test_threads_with_budgets_of_their_own() -> None:
    model, given = build("smolvlm"), call("smolvlm")
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    found: dict[int, Any] = {}

    def work(n: int) -> None:
        with torch.no_grad(), vtoken.budget(model, num_tokens=n):
            for _ in range(3):
                found[n] = (model(**given).logits, model.generate(**given, **GREEDY))

    expected = {}
    for n in (1, 2, 3, 4):
        work(n)
        expected[n] = found.pop(n)
    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, (logits, ids) in expected.items():
        assert torch.equal(found[n][0], logits)
        assert torch.equal(found[n][1], ids)


@torch.no_grad()
def test_hooks_of_the_tower_get_its_own_modules() -> None:
    for kind in KINDS:
        model, given = build(kind), call(kind)
        names, seen = {m: n for n, m in model.named_modules()}, list[str]()
        for name, module in model.named_modules():
            if re.match(r"model\.(vision|multi_modal|connector)", name):
                module.register_forward_hook(lambda m, *_, names=names, seen=seen: seen.append(names[m]))
        model(**given)
        stock, _ = set(seen), seen.clear()
        for config in (vtoken.VTCCLS(num_tokens=3), vtoken.VisionZip(num_tokens=3)):
            with vtoken.applied(model, config):
                model(**given)
                assert set(seen) == stock, kind
            seen.clear()


@torch.no_grad()
def test_llava_over_clip_stays_with_its_own_family() -> None:
    for model, name in ((llavas.build("llava"), "LlavaAdapter"), (build("llava_pixtral"), "LlavaPixtral")):
        assert type(vtoken.apply(model, vtoken.VTCCLS(num_tokens=3))._vtoken_family).__name__ == name
