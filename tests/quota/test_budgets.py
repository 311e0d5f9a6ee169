"""Budgets and bounds: how many tokens every frame gets, and from which scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vtoken

pytest.importorskip("transformers")

from tests.quota.builders import FAMILIES, QWEN, VIDEO, build, one_video, prompt

SCORES = [0.1, 0.9, 0.4, 0.3]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


class Scoring(torch.nn.Linear):
    """A scorer that is a module."""

    def score(self, frames: Any, clue: Any) -> torch.Tensor:
        return torch.ones(len(frames))


@pytest.mark.parametrize(
    ("budget", "tokens"),
    [
        (np.int64(7), 7),
        (np.float32(0.5), 50),
        ([np.int32(33)], 33),
        (7, 7),
        (1, 1),
        (1.0, 100),
        (0.5, 50),
        (0.015, 2),
        (0.004, 1),
        (None, 4 * 81),
        (10_000, 4 * 81),
        ([33], 33),
    ],
)
def test_budgets_are_spent_to_the_token(budget: Any, tokens: int) -> None:
    given = one_video("onevision")
    quota = vtoken.QuotaVideoModel(build("onevision"), budget=budget)
    call = quota.prepare(**given, frame_scores=[0.1, 0.9, 0.4, 0.8])
    report = call.reports[0]
    assert report.content_tokens == report.budget_effective == sum(report.tokens_per_frame) == tokens
    assert int((call["input_ids"] == VIDEO).sum()) == tokens + 1
    assert report.separator_tokens == 1
    assert (report.sequence_length_before, report.sequence_length_after) == (105, 105 - 100 + tokens)
    assert report.baseline_content_tokens == 100
    assert report.scores == (0.1, 0.9, 0.4, 0.8)
    assert report.prefill_flops_after is not None
    assert (report.prefill_flops_after < report.prefill_flops_before) == (tokens < 100)


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_frame_gets_what_fits(kind: str) -> None:
    given, model = one_video(kind, 1), build(kind)
    for budget, tokens in ((5, 5), (10_000, {"onevision": 81, "next": 64}.get(kind, 6))):
        report = vtoken.QuotaVideoModel(model, budget=budget).prepare(**given, frame_scores=[0.0]).reports[0]
        assert report.tokens_per_frame == (tokens,)


def test_bounds_per_frame() -> None:
    model, given = build("onevision"), one_video("onevision")
    report = vtoken.QuotaVideoModel(model, budget=40, min_tokens=3, max_tokens=20).prepare(
        **given, frame_scores=[0, 1, 0, 0.01]
    ).reports[0]  # fmt: skip
    assert report.tokens_per_frame[1] == 20
    assert min(report.tokens_per_frame) == 3
    assert sum(report.tokens_per_frame) == 40
    gone = vtoken.QuotaVideoModel(model, budget=20).prepare(**given, frame_scores=[0, 1, 0, 0.0]).reports[0]
    assert (gone.tokens_per_frame, gone.frames_kept) == ((0, 20, 0, 0), 1)
    even = vtoken.QuotaVideoModel(model, budget=22, power=0).prepare(**given, frame_scores=SCORES).reports[0]
    assert sorted(even.tokens_per_frame) == [5, 5, 6, 6]
    with pytest.raises(ValueError, match=r"of 11 tokens is too few for 4 frames with min_tokens=3: use fewer frames"):
        vtoken.QuotaVideoModel(model, budget=11, min_tokens=3)(**given, frame_scores=SCORES)
    with pytest.raises(ValueError, match=r"leaves 11 beside the separators, too few for 4 frames with min_tokens=3"):
        vtoken.QuotaVideoModel(model, budget=12, min_tokens=3, count_separators=True)(**given, frame_scores=SCORES)
    with pytest.raises(ValueError, match=r"min_tokens=82 is more than the 9 x 9 features of a frame .* most is 81"):
        vtoken.QuotaVideoModel(model, budget=400, min_tokens=82)(**given, frame_scores=SCORES)


@pytest.mark.parametrize("kind", ["qwen3", "llama3"])
def test_frames_with_runs_of_their_own_keep_a_token(kind: str) -> None:
    model, given = build(kind), one_video(kind)
    report = vtoken.QuotaVideoModel(model, budget=5).prepare(**given, frame_scores=[0, 1, 0, 0]).reports[0]
    assert report.tokens_per_frame == (1, 2, 1, 1)
    with pytest.raises(ValueError, match="fewer frames, min_tokens=0"):
        vtoken.QuotaVideoModel(model, budget=3).prepare(**given, frame_scores=SCORES)
    none = vtoken.QuotaVideoModel(model, budget=3, min_tokens=0)
    call = none.prepare(**given, frame_scores=[0, 1, 0, 0])
    assert call.reports[0].tokens_per_frame == (0, 3, 0, 0)
    assert call["input_ids"][0].tolist() == [
        3, 10, 56, 57, 11, 56, VIDEO, VIDEO, VIDEO, 57, 12, 56, 57, 13, 56, 57, 7, 8, 9,
    ]  # fmt: skip
    assert none.generate(**given, frame_scores=[0, 1, 0, 0], **GREEDY).shape[1] == given["input_ids"].shape[1] + 4


@pytest.mark.parametrize("kind", QWEN)
def test_scores_per_frame_or_per_merged_cell(kind: str) -> None:
    model, given = build(kind), one_video(kind)
    quota = vtoken.QuotaVideoModel(model, budget=13)
    cell = quota.prepare(**given, frame_scores=[0.2, 0.9, 0.4, 0.3]).reports[0]
    for frames in ([0.1, 0.2, 0.9, 0.0, 0.4, 0.4, 0.1, 0.3], [0.1, 0.2, 0.9, 0.0, 0.4, 0.4, 0.3]):
        assert quota.prepare(**given, frame_scores=torch.tensor(frames, dtype=torch.float64)).reports[0] == cell
    with pytest.raises(ValueError, match=r"5 scores for video 0, which has 4 cells of 2 frames \(4 or 8 scores\)"):
        quota.prepare(**given, frame_scores=[0.1] * 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_of_any_precision(dtype: torch.dtype) -> None:
    given, scores = one_video("onevision"), torch.tensor([0.1, 0.9, 0.4, 0.3]).to(dtype)
    quota = vtoken.QuotaVideoModel(build("onevision"), budget=31)
    report = quota.prepare(**given, frame_scores=scores).reports[0]
    expected = vtoken.ops.allocate_tokens(scores.double(), 31, max_tokens=81)
    assert list(report.tokens_per_frame) == expected


def test_budget_lists_and_settings_are_checked() -> None:
    model, given = build("onevision"), one_video("onevision")
    with pytest.raises(ValueError, match=r"2 budgets for 1 video"):
        vtoken.QuotaVideoModel(model, budget=[3, 4])(**given, frame_scores=SCORES)
    for wrong in (
        {"budget": 0}, {"budget": 1.5}, {"budget": 0.0}, {"budget": True}, {"budget": "9"}, {"budget": [3, -1]},
        {"mode": "nearest"}, {"min_tokens": -1}, {"max_tokens": 0}, {"vision_chunk": 0}, {"min_tokens": 1.5},
        {"count_separators": 1}, {"adapter": "llava"}, {"power": -3}, {"power": float("nan")}, {"power": "2"},
        {"budget": np.int64(0)}, {"budget": np.float32(1.5)}, {"budget": float("nan")}, {"min_tokens": True},
    ):  # fmt: skip
        with pytest.raises(vtoken.ConfigError, match=next(iter(wrong))):
            vtoken.QuotaVideoModel(model, **wrong)
    with pytest.raises(vtoken.ConfigError, match="at least min_tokens=9"):
        vtoken.QuotaVideoModel(model, budget=50, min_tokens=9, max_tokens=5)


def test_settings_change_between_calls_and_are_checked() -> None:
    model, given = build("onevision"), one_video("onevision")
    quota = vtoken.QuotaVideoModel(model)
    assert (quota.mode, quota.min_tokens, quota.max_tokens, quota.power) == ("bilinear", None, None, 2.0)
    assert (quota.count_separators, quota.vision_chunk, quota.budget) == (False, 32, None)
    changes: dict[str, Any] = {
        "budget": 40, "mode": "pool", "min_tokens": 3, "max_tokens": 20, "power": 1.0, "count_separators": True,
        "vision_chunk": 2,
    }  # fmt: skip
    for name, value in changes.items():
        setattr(quota, name, value)
        assert getattr(quota, name) == value
    with torch.no_grad():
        built = vtoken.QuotaVideoModel(model, **changes)(**given, frame_scores=SCORES).logits
        assert torch.equal(quota(**given, frame_scores=SCORES).logits, built)
    wrong: dict[str, Any] = {
        "budget": 0, "mode": "bogus", "min_tokens": 21, "max_tokens": 2, "power": -3, "count_separators": 1,
        "vision_chunk": 0, "adapter": "auto",
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(vtoken.ConfigError, match=name):
            setattr(quota, name, value)
        assert getattr(quota, name) == changes.get(name, quota.adapter)
    with pytest.raises(vtoken.ConfigError, match=r"adapter is used when QuotaVideoModel is built"):
        quota.adapter = quota.adapter
    own = vtoken.QuotaVideoModel(build("qwen3"), min_tokens=0)
    own.budget, own.min_tokens = 5, None
    report = own.prepare(**one_video("qwen3"), frame_scores=[0, 1, 0, 0]).reports[0]
    assert report.tokens_per_frame == (1, 2, 1, 1), "None is the model's own floor"


def test_a_scorer_set_later_is_no_part_of_the_state() -> None:
    quota = vtoken.QuotaVideoModel(build("onevision"))
    before = list(quota.state_dict())
    quota.scorer = Scoring(2, 2)
    assert list(quota.state_dict()) == before
    assert isinstance(quota.scorer, torch.nn.Linear)


def test_runs_that_the_processor_shortened() -> None:
    """VideoLLaMA3's processor leaves out placeholders of still frames; a run still has what its frame got."""
    model, given = build("llama3"), one_video("llama3")
    still = torch.tensor([6, 1, 2, 6])
    given["video_compression_mask"] = torch.cat([torch.arange(6) < n for n in still])
    body = [token for t, n in enumerate(still.tolist()) for token in [10 + t, 56, *[VIDEO] * n, 57]]
    given |= prompt("llama3", [[3, body, 7, 8, 9]])
    quota = vtoken.QuotaVideoModel(model, budget=14)
    with torch.no_grad():
        call = quota.prepare(**given, frame_scores=[0.1, 0.9, 0.8, 0.2])
        assert call.reports[0].tokens_per_frame == (1, 6, 6, 1)
        runs = [token for t, n in enumerate((1, 6, 6, 1)) for token in [10 + t, 56, *[VIDEO] * n, 57]]
        assert call["input_ids"][0].tolist() == [3, *runs, 7, 8, 9]
        assert bool((call.index.diff(dim=1) >= 0).all())
        whole = one_video("llama3")
        assert torch.equal(quota(**given, frame_scores=[0.1, 0.9, 0.8, 0.2]).logits,
                           quota(**whole, frame_scores=[0.1, 0.9, 0.8, 0.2]).logits)  # fmt: skip
        features = quota.encode_video(**given)
        assert [cell.tokens for cell in features.visual.cells] == [6, 1, 2, 6]
        given["video_compression_mask"] = given["video_compression_mask"][:-1]
        with pytest.raises(ValueError, match="23 entries for 24 features"):
            quota.prepare(**given, frame_scores=SCORES)
