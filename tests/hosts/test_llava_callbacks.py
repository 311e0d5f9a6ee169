"""What stopping criteria, logits processors and streamers see while a shortened prompt is answered."""

from __future__ import annotations

import inspect
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken

transformers = pytest.importorskip("transformers")

from tests.hosts.llavas import build, by_hand, features_of, images, plain_scores, plain_top, prompt  # noqa: E402

END = 41


class Criterion:
    """Stops at a token behind a place, as users write it; notes the ids that it is shown."""

    def __init__(self, token: int, start: int) -> None:
        self.ids: list[Tensor] = []
        self.token, self.start = token, start

    def __call__(self, ids: Tensor, scores: Any, **options: Any) -> Tensor:
        self.ids.append(ids.clone())
        return (ids[:, self.start :] == self.token).any(1)


class Processor:
    """Notes the ids that it is shown."""

    def __init__(self) -> None:
        self.ids: list[Tensor] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.ids.append(ids.clone())
        return scores


def case(side: str = "left") -> tuple[Any, dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """A model, a padded batch, its images, and its kept embeddings put in by hand."""
    model, given, pixels = build("llava"), prompt([1, -36, 5, -36, 7], [1, 6, 8, 7, 8, -36], pad=side), images(3)
    with torch.no_grad():
        kept = [plain_top(row, 6) for row in plain_scores(model, pixels, 2, 2)]
        fed = by_hand(model, given, features_of(model, pixel_values=pixels), kept, side=side)
    return model, given, pixels, fed


SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 1},
    {"bad_words_ids": [[8, 20], [7, 9]]},
    {"num_beams": 3, "repetition_penalty": 3.0, "num_return_sequences": 2},
    {"num_beams": 2, "no_repeat_ngram_size": 1},
    {"do_sample": True, "num_return_sequences": 3, "top_k": 9, "repetition_penalty": 2.0},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_settings_read_the_ids_of_the_caller(options: dict[str, Any]) -> None:
    """As the library does with embeddings, beside which it takes ids of any length for its processors."""
    model, given, pixels, fed = case()
    options = {
        "do_sample": False,
        "max_new_tokens": 6,
        "output_scores": True,
        "return_dict_in_generate": True,
    } | options
    torch.manual_seed(0)
    expected = model.generate(**fed, input_ids=given["input_ids"], **options)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    torch.manual_seed(0)
    found = model.generate(**given, pixel_values=pixels, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.scores, expected.scores, strict=True):
        # How much of the padding is left out of the penalty differs, as the masks do.
        torch.testing.assert_close(a[:, 1:], b[:, 1:], rtol=1e-4, atol=1e-4)


def loop(model: Any, fed: dict[str, Tensor], ids: Tensor, made: list[Any], steps: int) -> Tensor:
    """Greedy decoding without a cache; processors are asked with the caller's ids and the new ones."""
    embeds, mask = fed["inputs_embeds"], fed["attention_mask"]
    with torch.no_grad():
        for _ in range(steps):
            places = (mask.cumsum(1) - 1).clamp_min(0)
            logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=places).logits[:, -1]
            for processor in made:
                logits = processor(ids, logits)
            new = logits.argmax(-1)
            ids = torch.cat([ids, new.unsqueeze(1)], 1)
            embeds = torch.cat([embeds, model.get_input_embeddings()(new).unsqueeze(1)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


PROCESSORS = [
    "repetition", "ngram", "encoder_repetition", "encoder_ngram", "min_length", "min_new_tokens", "prefix", "forced",
    "user",
]  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_in_a_loop_by_hand(name: str) -> None:
    t = transformers
    model, given, pixels, fed = case()
    ids = given["input_ids"]
    full = ids.shape[1]
    first = int(loop(model, fed, ids, [], 1)[0, -1])
    options: dict[str, Any] = {"max_new_tokens": 6}

    def allowed(row: int, seen: Tensor) -> list[int]:
        assert torch.equal(seen[:full], ids[row])
        return [int(seen[-1]) % 50 + 2, len(seen) % 40 + 3]

    def user(seen: Tensor, scores: Tensor) -> Tensor:
        return scores + torch.nn.functional.one_hot(seen.sum(1) % 60, 60) * 9.0

    try:
        repetition = t.RepetitionPenaltyLogitsProcessor(3.0, prompt_ignore_length=given["attention_mask"].argmax(1))
    except ValueError:  # a transformers in which padding counts as said
        repetition = t.RepetitionPenaltyLogitsProcessor(3.0)
    made, more = {
        "repetition": ([repetition], {"repetition_penalty": 3.0}),
        "ngram": ([t.NoRepeatNGramLogitsProcessor(1)], {"no_repeat_ngram_size": 1}),
        "encoder_repetition": ([t.EncoderRepetitionPenaltyLogitsProcessor(5.0, ids)],
                               {"encoder_repetition_penalty": 5.0}),
        "encoder_ngram": ([t.EncoderNoRepeatNGramLogitsProcessor(1, ids)], {"encoder_no_repeat_ngram_size": 1}),
        "min_length": ([t.MinLengthLogitsProcessor(full + 2, first)], {"min_length": full + 2}),
        "min_new_tokens": ([t.MinNewTokensLengthLogitsProcessor(full, 2, first)], {"min_new_tokens": 2}),
        "prefix": ([t.PrefixConstrainedLogitsProcessor(allowed, 1)], {"prefix_allowed_tokens_fn": allowed}),
        "forced": ([t.ForcedEOSTokenLogitsProcessor(full + 6, END)], {"forced_eos_token_id": END}),
        "user": ([user], {"logits_processor": [user]}),
    }[name]  # fmt: skip
    if name.startswith("min"):
        more["eos_token_id"] = first
    expected = loop(model, fed, ids, made, 6)
    assert name in ("min_length", "min_new_tokens", "encoder_ngram") or not torch.equal(
        expected, loop(model, fed, ids, [], 6)
    )
    stock = model.generate(**given, pixel_values=pixels, do_sample=False, **options, **more)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    found = model.generate(**given, pixel_values=pixels, do_sample=False, **options, **more)
    if name.startswith("min"):
        assert found.shape[1] > full + 2
        for row, right in zip(found[:, full:].tolist(), expected[:, full:].tolist(), strict=True):
            until = right.index(first) if first in right else len(right)
            assert row[:until] == right[:until]
    else:
        assert torch.equal(found, expected)
    if name == "encoder_ngram":
        out = model.generate(
            **given, pixel_values=pixels, max_new_tokens=1, **more, output_scores=True, return_dict_in_generate=True
        )
        assert out.scores[0].gather(1, ids).isneginf().all()
    vtoken.configure(model, num_tokens=36)
    assert torch.equal(model.generate(**given, pixel_values=pixels, do_sample=False, **options, **more), stock)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_every_callback_sees_the_ids_of_the_caller(side: str, options: dict[str, Any]) -> None:
    model, given, pixels, _ = case(side)
    full = given["input_ids"].shape[1]
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    criterion, processor = Criterion(-1, 0), Processor()
    out = model.generate(
        **given, pixel_values=pixels, max_new_tokens=4, do_sample=False, stopping_criteria=[criterion],
        logits_processor=[processor], **options,
    )  # fmt: skip
    assert [seen.shape[1] - full for seen in processor.ids] == [0, 1, 2, 3]
    assert [seen.shape[1] - full for seen in criterion.ids] == [1, 2, 3, 4]
    for seen in processor.ids + criterion.ids:
        assert torch.equal(seen[:, :full], given["input_ids"].repeat_interleave(len(seen) // 2, 0))
    assert all(any(torch.equal(row, seen) for seen in criterion.ids[-1]) for row in out)


def test_a_criterion_stops_where_it_should() -> None:
    model, given, pixels, _ = case()
    one = {k: v[1:, -41:] for k, v in given.items()} | {"pixel_values": pixels[2:]}
    full = one["input_ids"].shape[1]
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    free = model.generate(**one, max_new_tokens=9, do_sample=False)[0, full:].tolist()
    token = free[3]
    stopped = model.generate(**one, max_new_tokens=9, do_sample=False, stopping_criteria=[Criterion(token, full)])
    assert stopped[0, full:].tolist() == free[: free.index(token) + 1]


def test_stop_strings_and_text_streamers() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"abcdef" if i == 58 else f"w{i}": i for i in range(60)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")
    model, given, pixels, _ = case()
    one = {k: v[1:, -41:] for k, v in given.items()} | {"pixel_values": pixels[2:]}
    full = one["input_ids"].shape[1]
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    free = model.generate(**one, max_new_tokens=9, do_sample=False)[0, full:].tolist()
    shown: list[str] = []

    class Streamer(transformers.TextStreamer):  # type: ignore[name-defined,misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            shown.append(text)

    stopped = model.generate(
        **one, max_new_tokens=9, do_sample=False, stop_strings=[f"w{free[2]}"], tokenizer=tokenizer,
        streamer=Streamer(tokenizer, skip_prompt=True),
    )  # fmt: skip
    assert stopped[0, full:].tolist() == free[: free.index(free[2]) + 1]
    assert "".join(shown).split() == [f"w{i}" for i in stopped[0, full:].tolist()]
    with pytest.raises(ValueError, match="streamer"):
        model.generate(**one, max_new_tokens=2, num_beams=2, streamer=Streamer(tokenizer))


def test_hooks_see_the_model_and_nothing_stays_on_it() -> None:
    model, given, pixels, _ = case()
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    before, modules = dict(model.__dict__), []
    handle = model.register_forward_hook(lambda m, i, o: modules.append(m))
    model.generate(**given, pixel_values=pixels, max_new_tokens=2, do_sample=False)
    handle.remove()
    assert len(modules) == 2
    assert all(m is model for m in modules)
    assert model.__dict__.keys() == before.keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"custom_generate": lambda *a, **k: None}, "custom_generate"), ({"token_healing": True}, "token_healing"),
        ({"cache_implementation": "paged"}, "paged"), ({"assistant_early_exit": 1}, "assistant_early_exit"),
        ({"use_mtp": True}, "use_mtp"), ({"assistant_tokenizer": 1}, "assistant_tokenizer"),
    ],
)  # fmt: skip
def test_ways_that_would_see_another_prompt_are_refused(options: dict[str, Any], words: str) -> None:
    model, given, pixels, _ = case()
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    with pytest.raises(vtoken.InputError, match=words):
        model.generate(**given, pixel_values=pixels, max_new_tokens=2, **options)


@pytest.mark.parametrize("name", ["_get_logits_processor", "_get_stopping_criteria"])
def test_a_release_that_makes_its_lists_otherwise_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What such a method made would see the short prompt: never a silently wrong answer."""
    model, given, pixels, _ = case()
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    mixin = transformers.GenerationMixin
    monkeypatch.setattr(mixin, "_made_anew", getattr(mixin, name), raising=False)
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(mixin.generate))).replace(
        f"self.{name}(", "self._made_anew("
    )
    assert "_made_anew(" in source
    body = source[source.index("def generate") :]
    space = dict(vars(sys.modules[mixin.__module__]))
    exec("from __future__ import annotations\n" + body, space)
    monkeypatch.setattr(mixin, "generate", torch.no_grad()(space["generate"]))
    call = {**given, "pixel_values": pixels, "max_new_tokens": 2, "do_sample": False}
    with pytest.raises(vtoken.UnsupportedModelError, match=rf"transformers {transformers.__version__} does not make"):
        model.generate(**call)
    monkeypatch.delattr(mixin, name)
    with pytest.raises(vtoken.UnsupportedModelError, match=name):
        model.generate(**call)
