"""Prompts with odd budgets against embeddings that are put together one token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
from tests.helpers import assert_close

pytest.importorskip("transformers")

from tests.quota.builders import (
    FAMILIES,
    GRID,
    IMAGE,
    NATIVE,
    VIDEO,
    build,
    image_inputs,
    one_video,
    prompt,
    run,
    video_inputs,
)
from tests.quota.by_hand import by_hand, logits_of

SCORES = [0.1, 0.9, 0.4, 0.3]


def counts_of(quota: Any, **given: Any) -> list[list[int]]:
    return [list(report.tokens_per_frame) for report in quota.prepare(**given).reports]


@pytest.mark.parametrize("mode", ["bilinear", "pool"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_hand_fed_embeddings(kind: str, mode: str) -> None:
    model, given = build(kind), one_video(kind)
    with torch.no_grad():
        full = model(**given).logits[:, -1]
        for budget in (5, 13, 4 * GRID[kind] - 1):
            quota = vtoken.QuotaVideoModel(model, budget=budget, mode=mode)
            counts = counts_of(quota, **given, frame_scores=SCORES)
            assert sum(counts[0]) == budget
            logits = quota(**given, frame_scores=SCORES).logits
            fed = by_hand(kind, model, given, counts, mode=mode)
            assert logits.shape[1] == fed["inputs_embeds"].shape[1]
            assert_close(f"{kind} {budget}", logits_of(model, fed), logits, 1e-5)
            assert float((logits[:, -1] - full).abs().max()) > 0.05, "the tokens that a video has must matter"


@pytest.mark.parametrize("kind", FAMILIES)
def test_more_tokens_than_the_model_would_spend(kind: str) -> None:
    """The native grid is the bound, not the model's own count."""
    model, given = build(kind), one_video(kind)
    most = NATIVE[kind][0] * NATIVE[kind][1]
    with torch.no_grad():
        quota = vtoken.QuotaVideoModel(model)  # 64 frames' worth, for 4 frames
        call = quota.prepare(**given, frame_scores=SCORES)
        assert call.reports[0].tokens_per_frame == (most,) * 4
        assert call.reports[0].budget_requested == 64 * GRID[kind]
        assert call.reports[0].budget_effective == 4 * most
        assert int((call["input_ids"] == VIDEO).sum()) == 4 * most + int(kind == "onevision")
        fed = by_hand(kind, model, given, [[most] * 4])
        assert_close(kind, logits_of(model, fed), quota(**given, frame_scores=SCORES).logits, 1e-5)


def batch(kind: str, pad: str) -> dict[str, Tensor]:
    rows = [[3, run(kind, 4), 7, 8, 9], [5, 6, 3, 4, run(kind, 4), 2, 2]]
    return prompt(kind, rows, pad) | video_inputs(kind, [4, 4])


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_padded_batches(kind: str, pad: str) -> None:
    model, given = build(kind), batch(kind, pad)
    quota = vtoken.QuotaVideoModel(model, budget=[9, 14])
    scores = [SCORES, [0.5, 0.1, 0.1, 0.8]]
    with torch.no_grad():
        counts = counts_of(quota, **given, frame_scores=scores)
        assert [sum(c) for c in counts] == [9, 14]
        reports = quota.prepare(**given, frame_scores=scores).reports
        assert [report.scores for report in reports] == [tuple(s) for s in scores], "every video has its own"
        fed = by_hand(kind, model, given, counts, side=pad)
        out = quota(**given, frame_scores=scores)
        seen = fed["attention_mask"].bool()
        assert_close(kind, logits_of(model, fed)[seen], out.logits[seen], 1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_loss_labels_and_gradients(kind: str) -> None:
    model, given = build(kind).train(), batch(kind, "right")
    labels = torch.where(given["attention_mask"] == 1, given["input_ids"], -100)
    quota = vtoken.QuotaVideoModel(model, budget=11)
    scores = torch.tensor([SCORES, SCORES], requires_grad=True)
    counts = counts_of(quota, **given, frame_scores=scores)
    out = quota(**given, labels=labels, frame_scores=scores)
    fed = by_hand(kind, model, given, counts, labels=labels)
    reference = logits_of(model, fed)
    loss = torch.nn.functional.cross_entropy(reference[:, :-1].flatten(0, 1), fed["labels"][:, 1:].flatten())
    assert_close("loss", loss, out.loss, 1e-5)
    out.loss.backward()
    assert scores.grad is None, "scores carry no gradient"
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(got) >= set(expected)
    tower = [name for name in expected if "vision" in name or "visual" in name]
    assert len(tower) > 10
    for name, gradient in expected.items():
        if float(gradient.abs().max()) > 1e-5:  # a key's bias has none
            assert_close(name, gradient, got[name], 1e-3)


@pytest.mark.parametrize("kind", FAMILIES)
def test_several_videos_in_one_prompt(kind: str) -> None:
    model = build(kind)
    cells = [4, 4] if kind in ("onevision", "next") else [4, 2]
    given = prompt(kind, [[3, run(kind, cells[0]), 7, run(kind, cells[1]), 9, 4]]) | video_inputs(kind, cells)
    scores = [SCORES, [0.5, 0.9, 0.1, 0.1][: cells[1]]]
    with torch.no_grad():
        for budget, expected in ((7, [7, 7]), ([5, 9], [5, 9]), ([None, 5], [None, 5])):
            quota = vtoken.QuotaVideoModel(model, budget=budget)
            counts = counts_of(quota, **given, frame_scores=scores)
            assert all(e in (None, sum(c)) for e, c in zip(expected, counts, strict=True))
            fed = by_hand(kind, model, given, counts)
            assert_close(kind, logits_of(model, fed), quota(**given, frame_scores=scores).logits, 1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_images_beside_videos_keep_their_own_count(kind: str) -> None:
    model = build(kind)
    pixels, count = image_inputs(kind)
    rows = model.model.get_image_features(**pixels).pooler_output
    images = list(rows) if not isinstance(rows, Tensor) else [rows.flatten(0, -2)]
    assert sum(map(len, images)) == count
    text = [3, [IMAGE] * count, 8, run(kind, 4), 9, 4]
    if kind in ("qwen2", "qwen2_5", "qwen3"):
        text.insert(1, 56)
    given = prompt(kind, [text]) | video_inputs(kind, [4]) | pixels
    quota = vtoken.QuotaVideoModel(model, budget=11)
    with torch.no_grad():
        call = quota.prepare(**given, frame_scores=SCORES)
        assert int((call["input_ids"] == IMAGE).sum()) == count
        counts = [list(call.reports[0].tokens_per_frame)]
        logits = quota(**given, frame_scores=SCORES).logits
        if kind == "qwen3":  # images have deeper levels too; full grid says whether they come through
            quota.budget = 1.0
            assert torch.equal(quota(**given, frame_scores=[1.0] * 4).logits, model(**given).logits)
            assert not torch.equal(logits[:, -1], model(**given).logits[:, -1])
            return
        assert_close(kind, logits_of(model, by_hand(kind, model, given, counts, images=images)), logits, 1e-5)
