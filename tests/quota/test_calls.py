"""What the wrapper takes and refuses, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtoken

pytest.importorskip("transformers")

from tests.quota.builders import (
    FAMILIES,
    GRID,
    IMAGE,
    QWEN,
    VIDEO,
    build,
    one_video,
    prompt,
    run,
    video_inputs,
)

SCORES = [0.1, 0.9, 0.4, 0.3]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


class Scoring(nn.Linear):
    """A scorer that is a module."""

    def score(self, frames: Any, clue: Any) -> torch.Tensor:
        return torch.ones(len(frames))


@pytest.mark.parametrize("kind", FAMILIES)
def test_calls_without_video_are_the_models_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind)
    quota = vtoken.QuotaVideoModel(model, budget=9)
    ids = torch.tensor([[3, 4, 5, 6]])
    stock, generated = model(input_ids=ids).logits, model.generate(ids, **GREEDY)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a text-only call was prepared")

    monkeypatch.setattr(type(quota), "prepare", never)
    assert torch.equal(quota(input_ids=ids).logits, stock)
    assert torch.equal(quota(ids).logits, stock)
    assert torch.equal(quota(input_ids=ids, query="and now?").logits, stock)
    assert torch.equal(quota.generate(ids, **GREEDY), generated)
    assert torch.equal(quota.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY), generated)


def test_the_wrapper_is_a_window_to_the_model() -> None:
    model = build("onevision")
    keys = list(model.state_dict())
    quota = vtoken.QuotaVideoModel(model, scorer=Scoring(2, 2))
    assert list(quota.state_dict()) == [f"model.{key}" for key in keys]
    assert list(model.state_dict()) == keys
    assert quota.unwrap() is model
    assert quota.config is model.config
    assert (quota.device, quota.dtype) == (model.device, model.dtype)
    assert quota.generation_config is model.generation_config
    assert quota.can_generate() is True
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = quota.nonsense
    with pytest.raises(AttributeError, match="tracing"):
        _ = quota.last_report
    assert quota.train().model.training
    assert not quota.eval().model.training
    model.load_state_dict({key.removeprefix("model."): value for key, value in quota.state_dict().items()})


def test_copies_pickles_and_saved_wrappers(tmp_path: Any) -> None:
    quota, given = vtoken.QuotaVideoModel(build("onevision"), budget=9), one_video("onevision")
    torch.save(quota, tmp_path / "quota.pt")  # after a video transformers' own hooks are in the tower, which cannot be
    copies = [copy.deepcopy(quota), pickle.loads(pickle.dumps(quota))]
    copies.append(torch.load(tmp_path / "quota.pt", weights_only=False))
    with torch.no_grad():
        expected = quota(**given, frame_scores=SCORES).logits
        for again in (*copies, copy.deepcopy(quota)):
            assert again.model is not quota.model
            assert torch.equal(again(**given, frame_scores=SCORES).logits, expected)


def broken(name: str) -> tuple[str, dict[str, Any], str]:
    """A call that is wrong, and what is said of it."""
    given: dict[str, Any] = one_video("onevision") | {"frame_scores": SCORES}
    ids = given["input_ids"]
    pixels = given.pop("pixel_values_videos")
    with_pixels = given | {"pixel_values_videos": pixels}
    match name:
        case "scores":
            return "onevision", with_pixels | {"frame_scores": [0.1] * 3}, "3 scores for video 0, which has 4 frames"
        case "score lists":
            return "onevision", with_pixels | {"frame_scores": [SCORES, SCORES]}, "2 video.s., but there are 1"
        case "negative":
            return "onevision", with_pixels | {"frame_scores": [0.1, -1, 0, 0]}, "finite and at least 0"
        case "nan":
            return "onevision", with_pixels | {"frame_scores": [0.1, float("nan"), 0, 0]}, "finite and at least 0"
        case "placeholders":
            wrong = torch.cat([ids, torch.tensor([[VIDEO]])], dim=1)
            return "onevision", with_pixels | {"input_ids": wrong}, r"102 video placeholders .* need 101"
        case "no pixels":
            return "onevision", {"input_ids": ids}, "101 video placeholders in the prompt, but no pixel_values_videos"
        case "no placeholders":
            return "onevision", with_pixels | {"input_ids": torch.tensor([[1, 2]])}, "0 video placeholders .* need 101"
        case "scores alone":
            return "onevision", {"input_ids": torch.tensor([[1, 2]]), "frame_scores": SCORES}, "came without"
        case "embeds":
            return "onevision", with_pixels | {"inputs_embeds": torch.zeros(1, 105, 48)}, "neither inputs_embeds"
        case "mask":
            return "onevision", with_pixels | {"attention_mask": torch.ones(1, 3)}, "attention_mask must be"
        case "logits":
            return "onevision", with_pixels | {"logits_to_keep": torch.tensor([1])}, "logits_to_keep"
        case "class token":
            given = one_video("next") | {"frame_scores": SCORES, "vision_feature_select_strategy": "full"}
            return "next", given, "65 features per frame, a grid of 8 x 8 has 64"
        case "grid":
            given = one_video("qwen2_5") | {"frame_scores": SCORES, "video_grid_thw": torch.tensor([[3, 4, 6]])}
            return "qwen2_5", given, "96 patches, video_grid_thw speaks of 72"
        case "merge sizes":
            given = one_video("llama3") | {"frame_scores": SCORES}
            del given["video_merge_sizes"]
            return "llama3", given, "video_merge_sizes"
    raise KeyError(name)


WRONG = (
    "scores", "score lists", "negative", "nan", "placeholders", "no pixels", "no placeholders", "scores alone",
    "embeds", "mask", "logits", "class token", "grid", "merge sizes",
)  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_are_refused(name: str) -> None:
    kind, given, says = broken(name)
    quota = vtoken.QuotaVideoModel(build(kind), budget=9)
    for enter in (quota, quota.generate) if name not in ("logits", "embeds") else (quota,):
        with pytest.raises(vtoken.InputError, match=says):
            enter(**given)


def test_other_models_are_refused_by_name() -> None:
    import transformers

    with pytest.raises(TypeError, match=r"LlavaOnevision.*VideoLlama3.*register_adapter"):
        vtoken.QuotaVideoModel(nn.Linear(2, 2))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    config = transformers.Qwen2Config(**sizes, intermediate_size=8, num_key_value_heads=1)
    text = transformers.Qwen2ForCausalLM(config)
    with pytest.raises(vtoken.UnsupportedModelError, match="Qwen2ForCausalLM"):
        vtoken.QuotaVideoModel(text)
    holder = nn.Module()
    holder.add_module("inner", build("onevision"))
    with pytest.raises(TypeError, match=r"use model\.inner"):
        vtoken.QuotaVideoModel(holder)


class ByBrightness:
    """Scores frames by their mean, and remembers what it was asked."""

    def __init__(self) -> None:
        self.clues: list[Any] = []

    def score(self, frames: Any, clue: Any) -> Tensor:
        self.clues.append(clue)
        return torch.tensor([float(torch.as_tensor(frame).float().mean()) for frame in frames])


def test_scorer_and_decoupler() -> None:
    model, given, scorer = build("onevision"), one_video("onevision"), ByBrightness()
    frames = [torch.full((4, 4, 3), v) for v in (0.1, 0.9, 0.4, 0.3)]
    plain = vtoken.QuotaVideoModel(model, budget=13)
    quota = vtoken.QuotaVideoModel(model, budget=13, scorer=scorer, decoupler=vtoken.video.RuleDecoupler())
    with torch.no_grad():
        expected = plain(**given, frame_scores=torch.tensor([0.1, 0.9, 0.4, 0.3])).logits
        for shown in (frames, [frames], torch.stack(frames), torch.stack(frames)[None].numpy()):
            assert torch.equal(quota(**given, frames=shown, query="Where is the red kite?").logits, expected)
        assert scorer.clues[0].items == ("red kite",)
        called = len(scorer.clues)
        assert torch.equal(quota(**given, frame_scores=torch.tensor([0.1, 0.9, 0.4, 0.3])).logits, expected)
        assert len(scorer.clues) == called, "scores that are given are used as they are"
    simple = vtoken.QuotaVideoModel(model, budget=13, scorer=scorer)
    simple.prepare(**given, frames=frames, query="Why?")
    assert (scorer.clues[-1].kind, scorer.clues[-1].text) == ("query", "Why?")
    for missing in ({"frames": frames}, {"query": "Why?"}, {}):
        with pytest.raises(ValueError, match=r"frames=\.\.\. and query="):
            simple.prepare(**given, **missing)
    with pytest.raises(ValueError, match="3 scores for video 0"):
        simple.prepare(**given, frames=frames[:3], query="Why?")
    with pytest.raises(ValueError, match=r"frames for 2 video"):
        simple.prepare(**given, frames=[frames, frames], query="Why?")


def test_questions_and_frames_per_video() -> None:
    model, scorer = build("onevision"), ByBrightness()
    given = prompt("onevision", [[3, run("onevision", 4), 7, run("onevision", 4)]]) | video_inputs("onevision", [4, 4])
    frames = [[torch.full((2, 2, 3), v) for v in values] for values in (SCORES, [0.5, 0.1, 0.1, 0.8])]
    quota = vtoken.QuotaVideoModel(model, budget=13, scorer=scorer)
    call = quota.prepare(**given, frames=frames, query=["one?", "two?"])
    assert [clue.text for clue in scorer.clues] == ["one?", "two?"]
    assert call.reports[0].scores == pytest.approx(SCORES)
    assert call.reports[1].tokens_per_frame[3] == max(call.reports[1].tokens_per_frame)
    assert call.reports[0].scorer_flops is None, "not known"


def test_without_scores_the_budget_is_spread_evenly_and_said_once() -> None:
    """Once for every wrapper, whatever others have said before."""
    model, given = build("onevision"), one_video("onevision")
    for _ in range(2):
        quota = vtoken.QuotaVideoModel(model, budget=21)
        state = list(quota.state_dict())
        with pytest.warns(UserWarning, match="neither frame_scores nor a scorer"):
            report = quota.prepare(**given).reports[0]
        assert report.tokens_per_frame == (6, 5, 5, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quota.prepare(**given)
        assert list(quota.state_dict()) == state


def test_features_in_place_of_pixels() -> None:
    model = build("qwen2_5")
    quota = vtoken.QuotaVideoModel(model, budget=13)
    pixels = [video_inputs("qwen2_5", [cells], seed) for cells, seed in ((4, 1), (2, 2))]
    text = prompt("qwen2_5", [[3, run("qwen2_5", 4), 7, run("qwen2_5", 2), 8]])
    both = {name: torch.cat([p[name] for p in pixels]) for name in pixels[0]}
    scores = [SCORES, [0.2, 0.3]]
    with torch.no_grad():
        direct = quota(**text, **both, frame_scores=scores).logits
        known = [quota.encode_video(**p) for p in pixels]
        assert torch.allclose(quota(**text, features=known, frame_scores=scores).logits, direct, atol=1e-5)
        with pytest.raises(ValueError, match="not both"):
            quota(**text, **both, features=known, frame_scores=scores)
        with pytest.raises(ValueError, match="takes one video, got 2"):
            quota.encode_video(**both)
        with pytest.raises(ValueError, match="needs pixel_values_videos"):
            quota.encode_video(**text)


def test_tracing_tells_and_nothing_else_remembers() -> None:
    quota, given = vtoken.QuotaVideoModel(build("onevision"), budget=9), one_video("onevision")
    with torch.no_grad():
        _, record = vtoken.trace(quota, **given, frame_scores=SCORES)
        call = quota.prepare(**given, frame_scores=SCORES)
        assert record.num_forwards == 1
        assert record.video.reports == call.reports
        assert torch.equal(record.video.input_ids, call["input_ids"])
        assert torch.equal(record.video.index, call.index)
        assert torch.equal(given["input_ids"].gather(1, call.index), call["input_ids"])
        assert bool((call.index.diff(dim=1) > 0).all())
        with pytest.raises(vtoken.VTokenError, match="nothing was recorded"), vtoken.tracing(quota):
            quota(input_ids=torch.tensor([[1, 2, 3]]))
        del call, record

        def tensors() -> int:
            gc.collect()
            return sum(isinstance(o, Tensor) for o in gc.get_objects())

        quota(**given, frame_scores=SCORES)
        before, attributes = tensors(), dict(quota.__dict__)
        quota(**given, frame_scores=SCORES)
        quota.generate(**given, frame_scores=SCORES, **GREEDY)
        assert tensors() <= before
        assert quota.__dict__ == attributes


def test_threads_do_not_disturb_each_other() -> None:
    model = build("onevision")
    calls = [(one_video("onevision", cells, seed), [s / 10 for s in range(1, cells + 1)], budget)
             for cells, seed, budget in ((4, 1, 9), (3, 2, 14), (5, 3, 30), (2, 4, 6))]  # fmt: skip
    wrappers = [vtoken.QuotaVideoModel(model, budget=budget) for *_, budget in calls]
    with torch.no_grad():
        alone = [q(**g, frame_scores=s).logits for q, (g, s, _) in zip(wrappers, calls, strict=True)]
    found: list[Any] = [None] * 4

    def work(i: int) -> None:
        given, scores, budget = calls[i]
        with torch.no_grad():
            for _ in range(5):
                with vtoken.tracing(wrappers[i]) as record:
                    logits = wrappers[i](**given, frame_scores=scores).logits
                assert record.video is not None
                assert record.video.reports[0].content_tokens == budget
        found[i] = logits

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


def test_compiled_models() -> None:
    model, given = build("onevision"), one_video("onevision")
    with torch.no_grad():
        expected = vtoken.QuotaVideoModel(model, budget=9)(**given, frame_scores=SCORES).logits
        compiled = vtoken.QuotaVideoModel(torch.compile(model, backend="eager"), budget=9)
        assert torch.allclose(compiled(**given, frame_scores=SCORES).logits, expected, atol=1e-5)
        assert compiled.generate(**given, frame_scores=SCORES, **GREEDY).shape[1] == 109
        whole = torch.compile(vtoken.QuotaVideoModel(model, budget=9), backend="eager")
        assert torch.allclose(whole(**given, frame_scores=SCORES).logits, expected, atol=1e-5)


def test_import_does_not_load_transformers() -> None:
    code = "import sys, vtoken; vtoken.QuotaVideoModel; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_image_placeholders_without_video_go_to_the_model() -> None:
    model = build("qwen2_5")
    rng = torch.Generator().manual_seed(5)
    given = prompt("qwen2_5", [[3, 56, [IMAGE] * 4, 57, 8]]) | {
        "pixel_values": torch.randn(16, 96, generator=rng), "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }  # fmt: skip
    quota = vtoken.QuotaVideoModel(model, budget=3)
    assert torch.equal(quota(**given).logits, model(**given).logits)
    assert torch.equal(quota.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    assert GRID["qwen2_5"] == 6


@pytest.mark.parametrize("kind", ["onevision", "next"])
def test_videos_of_different_length_in_a_list(kind: str) -> None:
    """The models themselves take one tensor only."""
    model = build(kind)
    parts = [video_inputs(kind, [cells], seed)["pixel_values_videos"][0] for cells, seed in ((4, 1), (2, 2))]
    given = prompt(kind, [[3, run(kind, 4), 7, run(kind, 2), 8]])
    quota = vtoken.QuotaVideoModel(model, budget=[11, 6])
    scores = [SCORES, [0.5, 0.2]]
    with torch.no_grad():
        out = quota(**given, pixel_values_videos=parts, frame_scores=scores).logits
        known = [quota.encode_video(pixel_values_videos=part[None]) for part in parts]
        assert torch.allclose(quota(**given, features=known, frame_scores=scores).logits, out, atol=1e-5)
    with pytest.raises(ValueError, match=r"must be .videos, frames, C, H, W."):
        quota(**given, pixel_values_videos=parts[0], frame_scores=scores)


@pytest.mark.parametrize("kind", QWEN)
def test_positions_of_the_callers_own(kind: str) -> None:
    model, given = build(kind), one_video(kind)
    quota = vtoken.QuotaVideoModel(model, budget=13)
    plain = quota.prepare(**given, frame_scores=SCORES)["position_ids"]
    names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
    own = model.model.get_rope_index(**{name: given[name] for name in names if name in given})[0]
    for positions in (own, torch.cat([own[:1], own])):
        assert torch.equal(quota.prepare(**given, position_ids=positions, frame_scores=SCORES)["position_ids"], plain)
    line = torch.arange(given["input_ids"].shape[1])[None]
    flat = quota.prepare(**given, position_ids=line, frame_scores=SCORES)
    assert torch.equal(flat["position_ids"][1:], flat.index.expand(3, -1, -1))
