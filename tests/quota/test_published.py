"""The published rounding and shape as settings, and calls that would run past the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtoken

pytest.importorskip("transformers")

from tests.quota.builders import VIDEO, build, one_video, rows_given
from vtoken.errors import VTokenWarning

SCORES = [0.1, 0.9, 0.4, 0.3]


@pytest.mark.parametrize("kind", ["onevision", "next", "qwen2_5"])
@pytest.mark.parametrize("budget", [11, 23])
def test_published_rounding_and_shape(kind: str, budget: int) -> None:
    model, given = build(kind), one_video(kind)
    quota = vtoken.QuotaVideoModel(model, budget=budget, rounding="floor", shape="floor")
    counts = vtoken.ops.allocate_tokens(SCORES, budget, rounding="floor")
    cell = quota.adapter.layout(model, given)[0].cells[0]
    grid = cell.native or cell.grid
    rows = [vtoken.ops.row_widths(t, *grid, shape="floor") for t in counts]
    prepared = quota.prepare(**given, frame_scores=SCORES)
    assert prepared.reports[0].tokens_per_frame == tuple(map(sum, rows))
    assert prepared.reports[0].rows_per_frame == tuple(map(len, rows))
    placeholders = int((prepared["input_ids"] == VIDEO).sum())
    assert placeholders == sum(map(sum, rows)) + (kind == "onevision")
    grids = quota.encode_video(**given).grid
    by_hand = [vtoken.ops.assign(g, t, shape="floor").tokens for g, t in zip(grids, counts, strict=True)]
    embeds = quota.adapter.finish(model, torch.cat(by_hand), quota.adapter.layout(model, given)[0])
    assert torch.allclose(rows_given(prepared)[: len(embeds)], embeds, atol=1e-5)
    assert quota(**given, frame_scores=SCORES).logits.shape[1] == prepared["input_ids"].shape[1]
    quota.rounding, quota.shape = "exact", "exact"
    assert sum(quota.prepare(**given, frame_scores=SCORES).reports[0].tokens_per_frame) == min(
        budget, 4 * grids[0, ..., 0].numel()
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounding": "up"}, {"shape": "Exact"}, {"shape": "floor", "mode": "merge"},
        {"rounding": "floor", "max_tokens": 4},
        {"rounding": "floor", "min_tokens": 1}, {"scorer": 3}, {"decoupler": "cot"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(vtoken.ConfigError):
        vtoken.QuotaVideoModel(build("next"), **wrong)


@pytest.mark.parametrize("kind", ["onevision", "qwen3"])
def test_nothing_runs_past_the_budget_without_a_word(kind: str) -> None:
    model, given = build(kind), one_video(kind)
    quota = vtoken.QuotaVideoModel(model, budget=9)
    for name in ("base_model", "get_decoder"):
        assert not hasattr(quota, name)
    with pytest.raises(AttributeError, match="past its budget"):
        quota.base_model(**given)
    embeds = model.get_input_embeddings()(given["input_ids"])
    rest = {name: value for name, value in given.items() if name != "input_ids"}
    with pytest.raises(vtoken.InputError, match="input_ids"):
        quota(inputs_embeds=embeds, **rest, frame_scores=SCORES)
    with pytest.raises(vtoken.InputError, match="input_ids"):
        quota.generate(inputs_embeds=embeds, **rest, frame_scores=SCORES, max_new_tokens=2)
    original = given | {"input_ids": torch.tensor([[1, -200, 5]])}
    with pytest.raises(vtoken.InputError, match="-200"):
        quota(**original, frame_scores=SCORES)


def test_features_that_are_ready_are_warned_of() -> None:
    model, given = build("qwen3"), one_video("qwen3")
    quota = vtoken.QuotaVideoModel(model, budget=9)
    prepared = quota.prepare(**given, frame_scores=SCORES)
    if "mm_encoder_outputs" not in prepared:
        pytest.skip("this release takes no features")
    ready = model.get_video_features(given["pixel_values_videos"], given["video_grid_thw"])
    rest = {name: given[name] for name in ("input_ids", "mm_token_type_ids", "video_grid_thw")}
    with pytest.warns(VTokenWarning, match="without a budget"):
        quota(**rest, mm_encoder_outputs={"video": ready})


def test_counts_are_compared_before_anything_is_scored() -> None:
    model, given = build("onevision"), one_video("onevision")

    class Never:
        def score(self, frames: Any, clue: Any) -> Any:
            raise AssertionError("scored")

    quota = vtoken.QuotaVideoModel(model, budget=9, scorer=Never())
    frames = [torch.zeros(3, 8, 8)] * 7
    with pytest.raises(vtoken.InputError, match=r"7 scores .* 4 frames.*do_sample_frames=False"):
        quota(**given, frames=frames, query="what?")
    with pytest.raises(vtoken.InputError, match="do_sample_frames"):
        quota.generate(**given, frame_scores=[0.5] * 7, max_new_tokens=2)
