"""What stopping criteria, logits processors and streamers see while a rebuilt video prompt is answered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken

transformers = pytest.importorskip("transformers")

from tests.quota.builders import FAMILIES, GRID, build, one_video  # noqa: E402
from tests.quota.by_hand import by_hand  # noqa: E402
from tests.quota.test_generate import GREEDY, OTHER, SCORES, two_rows  # noqa: E402

SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}, {"encoder_repetition_penalty": 3.0},
    {"encoder_no_repeat_ngram_size": 1}, {"bad_words_ids": [[9, 20], [9, 30]]}, {"num_beams": 2, "length_penalty": 2.0},
    {"do_sample": True, "num_return_sequences": 2},
]  # fmt: skip


@pytest.mark.parametrize("budget", [9, 300])
def test_settings_read_the_ids_of_the_caller(budget: int) -> None:
    """As the library does with embeddings, beside which it takes ids of any length for its processors."""
    model, given = build("onevision"), one_video("onevision")
    quota = vtoken.QuotaVideoModel(model, budget=budget)
    counts = [list(quota.prepare(**given, frame_scores=SCORES).reports[0].tokens_per_frame)]
    with torch.no_grad():
        fed = by_hand("onevision", model, given, counts)
    for options in SETTINGS:
        if any("encoder" in name for name in options):  # not beside embeddings
            continue
        torch.manual_seed(0)
        expected = model.generate(**fed, input_ids=given["input_ids"], **GREEDY | options)
        torch.manual_seed(0)
        assert torch.equal(quota.generate(**given, frame_scores=SCORES, **GREEDY | options), expected), options


@pytest.mark.parametrize("kind", FAMILIES)
def test_whole_budgets_answer_as_the_model_does(kind: str) -> None:
    model, given = build(kind), one_video(kind)
    whole = vtoken.QuotaVideoModel(model, budget=1.0)
    full = given["input_ids"].shape[1]
    lengths: list[dict[str, Any]] = [
        {"max_length": full + 4}, {"min_length": full + 3, "eos_token_id": list(range(30))},
        {"forced_eos_token_id": 41}, {"prefix_allowed_tokens_fn": lambda row, ids: [len(ids) % 50, int(ids[-1]) % 50]},
        {"logits_processor": [lambda ids, scores: scores + 9.0 * (torch.arange(60) == int(ids.sum()) % 60)]},
    ]  # fmt: skip
    for options in [*SETTINGS, *lengths]:
        torch.manual_seed(0)
        more = GREEDY | options
        if "max_length" in options:
            del more["max_new_tokens"]
        expected = model.generate(**given, **more)
        torch.manual_seed(0)
        assert torch.equal(whole.generate(**given, frame_scores=[0.5] * 4, **more), expected), options


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_every_callback_sees_the_ids_of_the_caller(kind: str, options: dict[str, Any]) -> None:
    model, (given, _) = build(kind), two_rows(kind)
    full, shown = given["input_ids"].shape[1], []

    def criterion(ids: Tensor, scores: Any, **more: Any) -> Tensor:
        shown.append(ids)
        return torch.zeros(len(ids), dtype=torch.bool)

    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        shown.append(ids)
        return scores

    quota = vtoken.QuotaVideoModel(model, budget=[7, 2 * GRID[kind] + 3])
    modules: list[Any] = []
    handle = model.register_forward_hook(lambda m, i, o: modules.append(m))
    quota.generate(
        **given, frame_scores=[SCORES, OTHER], max_new_tokens=3, do_sample=False, stopping_criteria=[criterion],
        logits_processor=[processor], **options,
    )  # fmt: skip
    handle.remove()
    assert sorted(ids.shape[1] - full for ids in shown) == [0, 1, 1, 2, 2, 3]
    for ids in shown:
        assert torch.equal(ids[:, :full], given["input_ids"].repeat_interleave(len(ids) // 2, 0))
    assert len(modules) == 3
    assert all(m is model for m in modules)


def test_a_criterion_stops_where_it_should() -> None:
    model, given = build("qwen2_5"), one_video("qwen2_5")
    quota = vtoken.QuotaVideoModel(model, budget=9)
    full = given["input_ids"].shape[1]
    free = quota.generate(**given, frame_scores=SCORES, **GREEDY)[0, full:].tolist()

    def criterion(ids: Tensor, scores: Any, **more: Any) -> Tensor:
        return (ids[:, full:] == free[2]).any(1)

    stopped = quota.generate(**given, frame_scores=SCORES, stopping_criteria=[criterion], **GREEDY)
    assert stopped[0, full:].tolist() == free[: free.index(free[2]) + 1]


@pytest.mark.parametrize("options", [{"token_healing": True}, {"custom_generate": lambda *a, **k: None}], ids=list)
def test_ways_that_would_see_another_prompt_are_refused(options: dict[str, Any]) -> None:
    model, given = build("onevision"), one_video("onevision")
    with pytest.raises(vtoken.InputError, match=next(iter(options))):
        vtoken.QuotaVideoModel(model, budget=9).generate(**given, frame_scores=SCORES, **GREEDY, **options)
