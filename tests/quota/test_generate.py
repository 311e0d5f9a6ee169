"""Generation from rebuilt prompts: caches, batches, lengths, later turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken

pytest.importorskip("transformers")

from tests.helpers import assert_close
from tests.quota.builders import FAMILIES, GRID, PAD, QWEN, VIDEO, build, one_video, prompt, run, video_inputs
from tests.quota.by_hand import by_hand, logits_of
from vtoken.prompts.family import takes_outputs

SCORES, OTHER = [0.1, 0.9, 0.4, 0.3], [0.5, 0.1, 0.1, 0.8]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def step_by_step(kind: str, model: Any, given: dict[str, Tensor], counts: list[list[int]], steps: int) -> list[int]:
    """Greedy decoding without a cache: all hand-fed embeddings anew for every token."""
    fed = by_hand(kind, model, given, counts)
    found: list[int] = []
    for _ in range(steps):
        token = int(logits_of(model, fed)[0, -1].argmax())
        found.append(token)
        step = model.get_input_embeddings()(torch.tensor([[token]]))
        fed["inputs_embeds"] = torch.cat([fed["inputs_embeds"], step], dim=1)
        fed["attention_mask"] = torch.ones(fed["inputs_embeds"].shape[:2], dtype=torch.long)
        if "position_ids" in fed:
            fed["position_ids"] = torch.cat([fed["position_ids"], fed["position_ids"][..., -1:] + 1], dim=-1)
        if "visual_pos_masks" in fed:
            fed["visual_pos_masks"] = torch.cat([fed["visual_pos_masks"], torch.tensor([[False]])], dim=1)
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_cached_is_uncached_is_by_hand(kind: str) -> None:
    model, given, answers = build(kind), one_video(kind), set()
    with torch.no_grad():
        for budget in (5, 13, 4 * GRID[kind] - 1):
            quota = vtoken.QuotaVideoModel(model, budget=budget)
            counts = [list(quota.prepare(**given, frame_scores=SCORES).reports[0].tokens_per_frame)]
            ids = quota.generate(**given, frame_scores=SCORES, **GREEDY)
            assert torch.equal(ids[:, :-6], given["input_ids"]), "the caller's ids come first"
            assert ids[0, -6:].tolist() == step_by_step(kind, model, given, counts, 6)
            uncached = quota.generate(**given, frame_scores=SCORES, use_cache=False, **GREEDY)
            assert torch.equal(uncached, ids)
            answers.add(tuple(ids[0, -6:].tolist()))
        answers.add(tuple(model.generate(**given, **GREEDY)[0, -6:].tolist()))
    assert len(answers) > 1, "another budget, another answer"


def two_rows(kind: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A left-padded batch and its rows alone."""
    rows = [[3, run(kind, 4), 7, 8, 9], [5, 6, 3, 4, run(kind, 4), 2, 2]]
    pixels = [video_inputs(kind, [4], seed) for seed in (1, 2)]
    both = {name: torch.cat([p[name] for p in pixels]) for name in pixels[0]}
    alone = [prompt(kind, [row]) | p for row, p in zip(rows, pixels, strict=True)]
    return prompt(kind, rows, "left") | both, alone


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_of_a_batch_generate_as_alone(kind: str) -> None:
    model = build(kind)
    given, alone = two_rows(kind)
    options: list[dict[str, Any]] = [GREEDY, {**GREEDY, "num_beams": 3}]
    for more in options:
        ids = vtoken.QuotaVideoModel(model, budget=[7, 15]).generate(**given, frame_scores=[SCORES, OTHER], **more)
        assert torch.equal(ids[:, :-6], given["input_ids"])
        for row, (budget, scores) in enumerate(((7, SCORES), (15, OTHER))):
            single = vtoken.QuotaVideoModel(model, budget=budget).generate(**alone[row], frame_scores=scores, **more)
            assert ids[row, -6:].tolist() == single[0, -6:].tolist()


@pytest.mark.parametrize("kind", FAMILIES)
def test_sampling_repeats_every_row(kind: str) -> None:
    model = build(kind)
    given, _ = two_rows(kind)
    quota = vtoken.QuotaVideoModel(model, budget=[7, 15])
    torch.manual_seed(0)
    out = quota.generate(
        **given, frame_scores=[SCORES, OTHER], do_sample=True, num_return_sequences=2, max_new_tokens=4, top_k=5,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert torch.equal(out.sequences[:, :-4], given["input_ids"].repeat_interleave(2, dim=0))
    first = quota(**given, frame_scores=[SCORES, OTHER])
    last = first.logits[:, -1]
    assert_close("first step", last.repeat_interleave(2, dim=0), out.logits[0], 1e-4)
    assert not torch.allclose(last[0], last[1], atol=0.1)


def test_a_mask_is_made_of_padding_as_the_library_makes_it() -> None:
    for kind in ("onevision", "qwen2_5"):
        model = build(kind)
        given, _ = two_rows(kind)
        quota = vtoken.QuotaVideoModel(model, budget=[7, 15])
        masked = quota.generate(**given, frame_scores=[SCORES, OTHER], **GREEDY)
        del given["attention_mask"]
        assert (given["input_ids"][0, 0] == PAD).item()
        assert torch.equal(quota.generate(**given, frame_scores=[SCORES, OTHER], **GREEDY), masked)
        model.generation_config.eos_token_id = PAD  # then padding cannot be told from an end
        plain = quota.generate(**given, frame_scores=[SCORES, OTHER], **GREEDY)
        assert not torch.equal(plain[:, -6:], masked[:, -6:])


@pytest.mark.parametrize("budget", [5, 300])
def test_lengths_count_the_prompt_of_the_caller(budget: int) -> None:
    """Whether the model's prompt is shorter or longer than that."""
    model, given = build("onevision"), one_video("onevision")
    quota = vtoken.QuotaVideoModel(model, budget=budget)
    length = given["input_ids"].shape[1]
    ids = quota.generate(**given, frame_scores=SCORES, max_length=length + 3, do_sample=False)
    assert ids.shape[1] == length + 3
    assert torch.equal(ids, quota.generate(given["input_ids"], frame_scores=SCORES, max_new_tokens=3, do_sample=False,
                                           pixel_values_videos=given["pixel_values_videos"]))  # fmt: skip
    with pytest.raises(ValueError, match=f"max_length={length} counts the prompt"):
        quota.generate(**given, frame_scores=SCORES, max_length=length)


@pytest.mark.parametrize("kind", FAMILIES)
def test_later_turns_go_on_from_the_cache(kind: str) -> None:
    model, given = build(kind), one_video(kind)
    quota, no_marks = vtoken.QuotaVideoModel(model, budget=13), {"suppress_tokens": [VIDEO]}
    with vtoken.tracing(quota) as record:
        out = quota.generate(**given, frame_scores=SCORES, return_dict_in_generate=True, **GREEDY, **no_marks)
    assert record.video is not None
    name = "cache" if "cache" in out else "past_key_values"
    ids, cache = out.sequences, out[name]
    later = torch.tensor([[4, 21, 22]])
    whole = {n: v for n, v in given.items() if n not in ("input_ids", "mm_token_type_ids")}
    full = torch.cat([ids, later], dim=1)
    types = {"mm_token_type_ids": (full == VIDEO) * 2} if kind in QWEN else {}
    if "mm_token_type_ids" in types:
        types["mm_token_type_ids"][:, given["input_ids"].shape[1] :] = 0
    with pytest.raises(ValueError, match="Send the whole conversation"):
        quota.generate(full, **{name: cache}, **GREEDY, **no_marks)
    with pytest.raises(ValueError, match="cache that is not empty"):
        quota.generate(full, **whole, **types, **{name: cache}, frame_scores=SCORES, **GREEDY, **no_marks)
    anew = ids[:, given["input_ids"].shape[1] :]
    expected = quota.generate(full, **whole, **types, frame_scores=SCORES, **GREEDY, **no_marks)
    short = torch.cat([record.video.input_ids, anew, later], dim=1)
    again = quota.generate(short, **{name: cache}, attention_mask=torch.ones_like(short), **GREEDY, **no_marks)
    assert again[0, -6:].tolist() == expected[0, -6:].tolist()


def test_streamers_and_refusals() -> None:
    model, given = build("onevision"), one_video("onevision")
    quota = vtoken.QuotaVideoModel(model, budget=9)

    class Streamer:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            pass

    streamer = Streamer()
    ids = quota.generate(**given, frame_scores=SCORES, streamer=streamer, **GREEDY)
    assert streamer.seen[-6:] == ids[0, -6:].tolist()
    assert streamer.seen == ids[0].tolist()
    with pytest.raises(ValueError, match="assisted decoding"):
        quota.generate(**given, frame_scores=SCORES, prompt_lookup_num_tokens=2, **GREEDY)
    if takes_outputs(model):
        chunked = quota.generate(**given, frame_scores=SCORES, prefill_chunk_size=4, **GREEDY)
        assert torch.equal(chunked, ids)
    else:
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            quota.generate(**given, frame_scores=SCORES, prefill_chunk_size=4, **GREEDY)
