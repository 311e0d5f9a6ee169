"""`generate` with a shortened prompt against loops fed by hand: lengths, beams, caches, streamers.

Source: docs/methods/vtc_cls.md 7.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
from tests.helpers import assert_close

transformers = pytest.importorskip("transformers")

from tests.hosts.llavas import IMAGE, build, by_hand, features_of, images, plain_scores, plain_top, prompt  # noqa: E402

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


def by_embeds(model: Any, given: dict[str, Tensor], pixels: Tensor, budget: int = 6) -> dict[str, Tensor]:
    """Kept embeddings, left padded, for a `generate` that returns new tokens only."""
    with torch.no_grad():
        kept = [plain_top(row, budget) for row in plain_scores(model, pixels, 2, 2)]
        return by_hand(model, given, features_of(model, pixel_values=pixels), kept, side="left")


def case(rows: str = "uneven") -> tuple[Any, dict[str, Tensor], Tensor]:
    chosen = {"uneven": ([1, -36, 5, -36, 7], [1, 6, -36]), "even": ([1, 5, -36, 7], [2, -36, 6, 8])}[rows]
    count = sum(token == -36 for row in chosen for token in row)
    return build("llava"), prompt(*chosen, pad="left"), images(count)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False},
        {"cache_implementation": "static"}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("rows", ["uneven", "even"])
def test_same_tokens_as_hand_fed_embeddings(options: dict[str, Any], rows: str) -> None:
    model, given, pixels = case(rows)
    expected = by_embeds(model, given, pixels)
    if "repetition_penalty" in options or "no_repeat_ngram_size" in options:  # these read the ids of the prompt
        expected["input_ids"] = given["input_ids"]
    reference = model.generate(**expected, **GREEDY, **options)[:, -6:]
    stock = model.generate(**given, pixel_values=pixels, **GREEDY, **options)[:, -6:]
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    ids = model.generate(**given, pixel_values=pixels, **GREEDY, **options)
    copies = ids.shape[0] // 2
    assert torch.equal(ids[:, :-6], given["input_ids"].repeat_interleave(copies, 0))
    assert torch.equal(ids[:, -6:], reference)
    assert not torch.equal(reference, stock), "pruning was to change the answer"


def test_every_step_is_the_manual_loop() -> None:
    model, given, pixels = case()
    fed = by_embeds(model, given, pixels)
    embeds, mask, new, scores = fed["inputs_embeds"], fed["attention_mask"], [], []
    with torch.no_grad():
        for _ in range(4):
            places = (mask.cumsum(1) - 1).clamp_min(0)
            logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=places).logits[:, -1]
            scores.append(logits)
            new.append(logits.argmax(-1))
            embeds = torch.cat([embeds, model.get_input_embeddings()(new[-1]).unsqueeze(1)], 1)
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    with vtoken.tracing(model) as record:
        out = model.generate(
            **given, pixel_values=pixels, do_sample=False, max_new_tokens=4, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    assert torch.equal(out.sequences[:, -4:], torch.stack(new, 1))
    assert torch.equal(out.sequences[:, :-4], given["input_ids"])
    for step in range(4):
        assert_close(f"step {step}", scores[step], out.logits[step], 1e-5)
    assert out.past_key_values.get_seq_length() == fed["inputs_embeds"].shape[1] + 3
    assert record.num_forwards == 1
    assert record.prompt is not None
    assert record.prompt.lengths == (6, 6, 6)
    assert record.prompt.input_ids.shape == fed["attention_mask"].shape


@pytest.mark.parametrize("kind", ["llava", "llava_siglip"])
def test_whole_budget_gives_the_same_ids(kind: str) -> None:
    model, given, pixels = build(kind), prompt([1, -36, 5], [7, 8, -36, 5], pad="left"), images(2)
    for options in ({}, {"num_beams": 2}):
        stock = model.generate(**given, pixel_values=pixels, **GREEDY, **options)
        with vtoken.applied(model, vtoken.VTCCLS(num_tokens=36)):
            assert torch.equal(model.generate(**given, pixel_values=pixels, **GREEDY, **options), stock)
    text = prompt([1, 5, 6])
    alone = model.generate(**text, **GREEDY)
    with vtoken.applied(model, vtoken.VTCCLS(num_tokens=3)):
        assert torch.equal(model.generate(**text, **GREEDY), alone)
        assert torch.equal(model.generate(text["input_ids"], **GREEDY), alone)


def test_sampling_repeats_the_prompt() -> None:
    model, given, pixels = case()
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    torch.manual_seed(0)
    ids = model.generate(**given, pixel_values=pixels, do_sample=True, max_new_tokens=5, num_return_sequences=3)
    assert ids.shape == (6, given["input_ids"].shape[1] + 5)
    assert torch.equal(ids[:, :-5], given["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(row[-5:].tolist()) for row in ids}) > 2


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_lengths_count_the_full_prompt(where: str) -> None:
    model, given, pixels = case("even")
    full = given["input_ids"].shape[1]
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    lengths = {"max_length": full + 4, "min_length": full + 2}
    options: dict[str, Any] = {"do_sample": False}
    if where == "argument":
        options |= lengths
    elif where == "config":
        options["generation_config"] = transformers.GenerationConfig(do_sample=False, pad_token_id=0, **lengths)
    else:
        model.generation_config.max_length, model.generation_config.min_length = full + 4, full + 2
    ids = model.generate(**given, pixel_values=pixels, **options)
    assert ids.shape[1] == full + 4
    if where == "argument":
        assert model.generate(**given, pixel_values=pixels, max_new_tokens=2, do_sample=False).shape[1] == full + 2
        with pytest.raises(vtoken.InputError, match=f"max_length={full}"):
            model.generate(**given, pixel_values=pixels, max_length=full)


def test_minimum_length_counts_the_full_prompt() -> None:
    model, given, pixels = case("even")
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    first = model.generate(**given, pixel_values=pixels, do_sample=False, max_new_tokens=6)
    full = given["input_ids"].shape[1]
    end = int(first[0, full])  # the first new token of row 0 ends it at once
    one = {k: v[:1] for k, v in given.items()} | {"pixel_values": pixels[:1]}
    short = model.generate(**one, do_sample=False, max_new_tokens=6, eos_token_id=end)
    assert short.shape[1] == full + 1
    longer = model.generate(**one, do_sample=False, max_new_tokens=6, min_length=full + 3, eos_token_id=end)
    assert longer.shape[1] >= full + 4
    assert end not in longer[0, full : full + 3].tolist()


def test_streamers_see_the_prompt_of_the_caller_first() -> None:
    model, given, pixels = case("even")
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    one = {k: v[:1] for k, v in given.items()} | {"pixel_values": pixels[:1]}
    seen: list[Tensor] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            seen.append(value)

        def end(self) -> None:
            seen.append(torch.tensor([-1]))

    ids = model.generate(**one, do_sample=False, max_new_tokens=3, streamer=Streamer())
    assert torch.equal(seen[0], one["input_ids"])
    assert [int(t) for t in seen[1:]] == [*ids[0, -3:].tolist(), -1]


def test_prefill_in_chunks() -> None:
    model, given, pixels = case("even")
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    expected = model.generate(**given, pixel_values=pixels, **GREEDY)
    if "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
        assert torch.equal(model.generate(**given, pixel_values=pixels, **GREEDY, prefill_chunk_size=4), expected)
    else:
        with pytest.raises(vtoken.InputError, match="prefill_chunk_size"):
            model.generate(**given, pixel_values=pixels, **GREEDY, prefill_chunk_size=4)


def test_going_on_from_a_cache() -> None:
    model, given, pixels = case("even")
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    with vtoken.tracing(model) as record:
        out = model.generate(**given, pixel_values=pixels, **GREEDY, return_dict_in_generate=True)
    more = torch.tensor([[5, 6], [7, 8]])
    full = torch.cat([out.sequences, more], 1)
    with pytest.raises(vtoken.InputError, match="shortened prompt"):
        model.generate(input_ids=full, past_key_values=out.past_key_values, **GREEDY)
    with pytest.raises(ValueError, match="shortened prompt"):
        model.generate(full, past_key_values=out.past_key_values, **GREEDY)
    with pytest.raises(vtoken.InputError, match="cache"):
        model.generate(input_ids=full, pixel_values=pixels, past_key_values=out.past_key_values, **GREEDY)
    again = model.generate(input_ids=full, pixel_values=pixels, **GREEDY)
    assert record.prompt is not None
    short = torch.cat([record.prompt.input_ids, out.sequences[:, -6:], more], 1)
    cached = model.generate(input_ids=short, past_key_values=out.past_key_values, **GREEDY)
    assert torch.equal(cached[:, -6:], again[:, -6:])


def test_a_forward_with_a_full_cache_is_refused() -> None:
    model, given, pixels = case("even")
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    with torch.no_grad():
        cache = model(input_ids=given["input_ids"], pixel_values=pixels, use_cache=True).past_key_values
        assert cache.get_seq_length() == given["input_ids"].shape[1] - 30
        with pytest.raises(ValueError, match="cache that is not empty"):
            model(input_ids=given["input_ids"], pixel_values=pixels, past_key_values=cache)
        model(input_ids=torch.tensor([[IMAGE], [5]]), past_key_values=cache)  # a generated placeholder is a token


def test_cache_of_the_unpatched_model_is_none_of_our_business() -> None:
    model, given, pixels = case("even")
    out = model.generate(**given, pixel_values=pixels, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([out.sequences, torch.tensor([[5], [6]])], 1)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    assert model.generate(input_ids=ids, past_key_values=out.past_key_values, **GREEDY).shape[1] == ids.shape[1] + 6


def test_what_cannot_be_generated() -> None:
    model, given, pixels = case("even")
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6, positions="original"))
    with pytest.raises(vtoken.InputError, match="use_cache=False"):
        model.generate(**given, pixel_values=pixels, **GREEDY, use_cache=False)


def test_rows_that_end_up_unequal_without_a_mask_are_padded_left() -> None:
    model, pixels = build("llava"), images(3)
    given = prompt([1, -36, -36, 7], [1, -36, *[5] * 37])
    expected = model.generate(**by_embeds(model, given, pixels), **GREEDY)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    with vtoken.tracing(model) as record:
        ids = model.generate(**given, pixel_values=pixels, **GREEDY)
    assert torch.equal(ids[:, -6:], expected[:, -6:])
    assert record.prompt is not None
    assert record.prompt.index[0, 0] == -1
