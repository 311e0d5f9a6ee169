"""Videos as visuals of the engine: QuoTA applied to a model, and the other prompt methods on frames."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
import vtoken.testing
from vtoken.errors import VTokenWarning

pytest.importorskip("transformers")

from tests.helpers import assert_close
from tests.hosts import llavas
from tests.prompts import qwens
from tests.quota.builders import (
    FAMILIES,
    GRID,
    QWEN,
    VIDEO,
    build,
    image_inputs,
    one_video,
    prompt,
    rows_given,
    run,
    thinned,
    video_inputs,
)

SCORES, OTHER = [0.1, 0.9, 0.4, 0.3], [0.5, 0.1, 0.1, 0.8]
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


def two_rows(kind: str) -> dict[str, Tensor]:
    rows = [[3, run(kind, 4), 7, 8, 9], [5, 6, 3, 4, run(kind, 4), 2, 2], [3, 4, 5]]
    return prompt(kind, rows, "left") | video_inputs(kind, [4, 4])


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_applied_quota_is_the_wrapper(kind: str) -> None:
    """The same logits and ids, images of the call whole in both; `remove` gives the model back."""
    model, given = build(kind), two_rows(kind)
    stock, classes = model(**given).logits, [type(m) for m in model.modules()]
    pixels, count = image_inputs(kind)
    start = [56] if kind in QWEN else []
    beside = prompt(kind, [[3, *start, [59] * count, 8, run(kind, 4), 9]]) | video_inputs(kind, [4]) | pixels
    quota = vtoken.QuotaVideoModel(model, budget=[9, 0.5])
    one = vtoken.QuotaVideoModel(model, budget=0.5)
    beams: dict[str, Any] = {"num_beams": 2, "num_return_sequences": 2, **GREEDY}
    more = {"frame_scores": [SCORES, OTHER]}
    expected = [quota(**given, **more).logits, quota.generate(**given, **more, **GREEDY)]
    expected += [quota.generate(**given, **more, **beams), one(**beside, frame_scores=SCORES).logits]
    vtoken.apply(model, vtoken.QuoTA(budget=[9, 0.5]))
    with vtoken.budget(model, **more):
        out, trace = vtoken.trace(model, **given)
        found = [out.logits, model.generate(**given, **GREEDY), model.generate(**given, **beams)]
    with vtoken.budget(model, budget=0.5, frame_scores=SCORES):
        found.append(model(**beside).logits)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    extra = int(kind == "onevision")
    assert trace.prompt.lengths == (9 + extra, (4 * GRID[kind] + 1) // 2 + extra)
    assert not torch.equal(out.logits[:, -1], stock[:, -1])
    text = torch.tensor([[3, 4, 5]])
    assert model(input_ids=text).logits.shape[1] == 3
    vtoken.remove(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(**given).logits, stock)


@torch.no_grad()
def test_settings_are_those_of_a_method(tmp_path: Any) -> None:
    model = build("qwen2")
    assert "quota" in vtoken.methods()
    config = vtoken.QuoTA(budget=[3, 0.5, None], mode="pool", min_tokens=1)
    assert vtoken.config_from_dict(config.to_dict()) == config
    vtoken.apply(model, "quota", budget=0.25)
    assert vtoken.config_of(vtoken.configure(model, budget=7)) == vtoken.QuoTA(budget=7)
    vtoken.save_settings(model, tmp_path / "applied")
    again = vtoken.load_settings(build("qwen2"), tmp_path / "applied")
    assert vtoken.config_of(again) == vtoken.QuoTA(budget=7)
    quota = vtoken.QuotaVideoModel(vtoken.remove(model), budget=0.25, power=1.0)
    assert vtoken.config_of(quota) == vtoken.QuoTA(budget=0.25, power=1.0)
    assert vtoken.configure(quota, budget=5).budget == 5
    with pytest.raises(vtoken.ConfigError, match="budget"):
        vtoken.configure(quota, budget=1.5)
    assert quota.budget == 5
    vtoken.save_settings(quota, tmp_path / "held")
    other = vtoken.QuotaVideoModel(model)
    assert vtoken.config_of(vtoken.load_settings(other, tmp_path / "held")) == vtoken.config_of(quota)
    given = one_video("qwen2")
    assert torch.equal(other(**given, frame_scores=SCORES).logits, quota(**given, frame_scores=SCORES).logits)
    with pytest.raises(vtoken.UnsupportedModelError):
        vtoken.load_settings(torch.nn.Linear(2, 2), tmp_path / "held")


def test_who_has_no_videos_is_told_at_once() -> None:
    model = llavas.build("llava")
    with pytest.raises(vtoken.ConfigError, match="shortens videos"):
        vtoken.apply(model, vtoken.QuoTA(budget=5))
    with pytest.raises(vtoken.UnsupportedModelError, match="knows only its images"):
        vtoken.QuotaVideoModel(model)
    with pytest.raises(vtoken.ConfigError, match="two methods act"):
        vtoken.apply(build("qwen2"), [vtoken.QuoTA(budget=5), vtoken.DivPrune(num_tokens=2)])
    quota = vtoken.apply(build("onevision"), vtoken.QuoTA(budget=5, mode="merge"))
    assert vtoken.num_tokens(quota, img_size=54) == vtoken.num_tokens(
        vtoken.apply(build("onevision"), vtoken.VTCCLS(keep_ratio=1.0)), img_size=54
    ), "images stay whole"
    match = "3 scores for a video, which has 4 frames"
    with pytest.raises(vtoken.InputError, match=match), vtoken.budget(quota, frame_scores=[1, 2, 3]):
        quota(**one_video("onevision"))
    with pytest.raises(vtoken.InputError, match="2 budgets for 1 video"), vtoken.budget(quota, budget=[3, 4]):
        quota(**one_video("onevision"))
    with pytest.raises(vtoken.ConfigError, match="no frame a whole token"):
        vtoken.QuotaVideoModel(build("next"), budget=1, rounding="floor")(**one_video("next"), frame_scores=SCORES)


@torch.no_grad()
def test_blocks_of_threads_do_not_see_each_other() -> None:
    model, given = build("next"), one_video("next")
    quota = vtoken.QuotaVideoModel(model, budget=40)
    asked = [(5, SCORES), (9, OTHER), (23, SCORES), (31, OTHER)]
    alone = [vtoken.QuotaVideoModel(model, budget=b)(**given, frame_scores=s).logits for b, s in asked]
    found: list[Any] = [None] * 4

    def work(i: int) -> None:
        with torch.no_grad(), vtoken.budget(quota, budget=asked[i][0], frame_scores=asked[i][1]):
            for _ in range(4):
                found[i] = quota(**given).logits

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
    with vtoken.budget(quota, frame_scores=OTHER):  # what a call brings itself wins
        assert torch.equal(quota(**given, frame_scores=SCORES).logits,
                           vtoken.QuotaVideoModel(model, budget=40)(**given, frame_scores=SCORES).logits)  # fmt: skip


@pytest.mark.parametrize("kind", ["onevision", "next", "llama3", "qwen2_5"])
def test_frames_are_shortened_like_images(kind: str) -> None:
    """Keeping all is bit-equal, pruned calls are hand-fed rows; see `vtoken.testing.check_family`."""
    given = two_rows(kind)
    if kind in ("qwen2_5",):
        given.pop("second_per_grid_ts")  # not flipped with the pixels
    vtoken.testing.check_family(build(kind), given)


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_moe", "qwen3_5_moe"])
@torch.no_grad()
def test_budgets_of_all_qwens(kind: str) -> None:
    """Whole frames are the model's own to the bit; with fewer tokens every cell keeps one."""
    model, given = qwens.build(kind), qwens.call(video=True, kind=kind)
    quota = vtoken.QuotaVideoModel(model, budget=1.0)
    [video] = [v for v in quota.adapter.layout(model, given) if v.kind == "video"]
    scores = [[0.3] * len(video.cells)]
    assert torch.equal(quota(**given, frame_scores=scores).logits, model(**given).logits)
    quota.budget = len(video.cells) + 1
    report = quota.prepare(**given, frame_scores=scores).reports[0]
    assert sorted(report.tokens_per_frame) == [1] * (len(video.cells) - 1) + [2]
    ids = quota.generate(**given, frame_scores=scores, max_new_tokens=2, do_sample=False)
    assert torch.equal(ids[:, :-2], given["input_ids"])


@torch.no_grad()
def test_thinned_frames_keep_what_the_processor_left() -> None:
    model, given = build("llama3"), thinned()
    vtoken.testing.check_family(model, given)
    with vtoken.applied(model, vtoken.DivPrune(keep_ratio=0.5)), vtoken.tracing(model) as trace:
        model(**given)
    assert [cell.tokens for cell in trace.prompt.visuals[0].cells] == [6, 1, 2, 6]
    assert trace.prompt.lengths == (3 + 1 + 1 + 3,)


@pytest.mark.parametrize("kind", ["onevision", "next"])
@torch.no_grad()
def test_attention_is_pooled_as_features_are(kind: str) -> None:
    """Against maps of the eager tower, pooled by the formula of the model's own pooling."""
    model, given = build(kind), one_video(kind)
    pixels, side = given["pixel_values_videos"][0], {"onevision": 9, "next": 8}[kind]
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=5, start_layer=1))
    with vtoken.tracing(model) as trace:
        out = model(**given)
    tower = vtoken.remove(model).model.vision_tower
    tower.set_attn_implementation("eager")
    last = {"onevision": 2, "next": 1}[kind]
    maps = tower(pixels, output_attentions=True).attentions[1 : last + 1]
    rows = torch.stack([m.mean(1)[:, 0, 1:] if kind == "next" else m.mean((1, 2)) for m in maps]).mean(0)
    square = rows.view(4, 1, side, side)
    pooled = (torch.nn.functional.avg_pool2d(square, 2) if kind == "next"
              else torch.nn.functional.interpolate(square, (5, 5), mode="bilinear")).flatten(1)  # fmt: skip
    assert_close(kind, pooled.flatten(), trace.prompt.scores[0][: 4 * GRID[kind]], 1e-5)
    best = torch.cat([row.topk(5).indices.sort().values + i * GRID[kind] for i, row in enumerate(pooled)])
    kept = trace.prompt.kept[0]
    assert kept[: 4 * 5].tolist() == best.tolist()
    assert len(kept) == 20 + int(kind == "onevision")
    tower.set_attn_implementation("sdpa")
    assert out.logits.shape[1] == given["input_ids"].shape[1] - 4 * (GRID[kind] - 5)


@torch.no_grad()
def test_merging_towers_and_methods_on_frames() -> None:
    model, given = build("next"), one_video("next")
    vtoken.apply(model.model.vision_tower, vtoken.PiToMe(ratio=0.8))
    with vtoken.applied(model, vtoken.DivPrune(num_tokens=4)):
        assert model(**given).logits.shape[1] == given["input_ids"].shape[1] - 4 * 12
    for config in (vtoken.VTCCLS(num_tokens=4), vtoken.VisionZip(num_tokens=4)):
        with pytest.raises(vtoken.ConfigError, match="merges tokens"), vtoken.applied(model, config):
            model(**given)


@pytest.mark.parametrize("kind", QWEN)
@torch.no_grad()
def test_a_second_turn_behind_another_call_is_the_uncached_one(kind: str) -> None:
    model, given = build(kind), one_video(kind)
    vtoken.apply(model, vtoken.QuoTA(budget=13))
    greedy = GREEDY | {"suppress_tokens": [VIDEO]}
    later = torch.tensor([[4, 21, 22]])
    with vtoken.budget(model, frame_scores=SCORES):
        with vtoken.tracing(model) as trace:
            out = model.generate(**given, return_dict_in_generate=True, **greedy)
        full = torch.cat([out.sequences, later], dim=1)
        types = torch.nn.functional.pad(given["mm_token_type_ids"], (0, full.shape[1] - given["input_ids"].shape[1]))
        whole = given | {"input_ids": full, "mm_token_type_ids": types}
        expected = model.generate(**whole, **greedy)
    with vtoken.budget(model, budget=6, frame_scores=OTHER):
        model.generate(**one_video(kind, seed=7), **greedy)
    new = out.sequences[:, given["input_ids"].shape[1] :]
    short = torch.cat([trace.prompt.input_ids, new, later], dim=1)
    name = "cache" if "cache" in out else "past_key_values"
    again = model.generate(short, **{name: out[name]}, attention_mask=torch.ones_like(short), **greedy)
    assert again[0, -5:].tolist() == expected[0, -5:].tolist()


@torch.no_grad()
def test_inner_models_do_not_run_past_a_budget() -> None:
    model, given = build("qwen2"), one_video("qwen2")
    vtoken.apply(model, vtoken.QuoTA(budget=5))
    with pytest.raises(vtoken.InputError, match="with videos past"):
        model.model(**given)
    pixels, count = image_inputs("qwen2")
    image = prompt("qwen2", [[3, 56, [59] * count, 8]]) | pixels
    assert model.model(**image).last_hidden_state.shape[1] == 3 + count, "images stay whole in any case"
    ready = model.get_video_features(given["pixel_values_videos"], given["video_grid_thw"])
    rest = {name: given[name] for name in ("input_ids", "mm_token_type_ids", "video_grid_thw")}
    if "mm_encoder_outputs" in model.forward.__signature__.parameters:
        with pytest.warns(VTokenWarning, match="runs unpruned"):
            model(**rest, mm_encoder_outputs={"video": ready})


def test_rows_that_are_handed_over_are_resampled_frames() -> None:
    model, given = build("onevision"), one_video("onevision")
    quota = vtoken.QuotaVideoModel(model, budget=[30])
    with torch.no_grad():
        call = quota.prepare(**given, frame_scores=SCORES)
        grids = quota.encode_video(**given).grid
        counts = call.reports[0].tokens_per_frame
        rows = torch.cat([vtoken.ops.assign(g, t).tokens for g, t in zip(grids, counts, strict=True)])
        assert torch.equal(rows_given(call)[:30], rows)
        assert torch.equal(rows_given(call)[30], model.model.image_newline)
