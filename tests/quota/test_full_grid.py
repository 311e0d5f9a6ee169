"""With every frame at the model's own count nothing changes, to the bit."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import vtoken

pytest.importorskip("transformers")

from tests.quota.builders import FAMILIES, GRID, QWEN, build, one_video, prompt, run, video_inputs

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
EVEN = [1.0] * 4


def wrapped(kind: str, model: Any, **options: Any) -> Any:
    """With settings under which every frame gets what the model gives it."""
    return vtoken.QuotaVideoModel(model, budget=1.0, mode="pool" if kind == "next" else "bilinear", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_and_generated_ids(kind: str, dtype: torch.dtype) -> None:
    model = build(kind).to(dtype)
    given = {name: v.to(dtype) if v.is_floating_point() and "second" not in name else v
             for name, v in one_video(kind).items()}  # fmt: skip
    quota = wrapped(kind, model)
    with torch.no_grad():
        assert torch.equal(quota(**given, frame_scores=EVEN).logits, model(**given).logits)
        stock, ours = model.generate(**given, **GREEDY), quota.generate(**given, frame_scores=EVEN, **GREEDY)
        assert torch.equal(stock, ours)
        assert torch.equal(stock[:, : given["input_ids"].shape[1]], given["input_ids"])


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_padded_batches_and_loss(kind: str, pad: str) -> None:
    model = build(kind)
    rows = [[3, run(kind, 4), 7, 8, 9], [5, 6, 3, 4, run(kind, 4), 2, 2]]
    given = prompt(kind, rows, pad) | video_inputs(kind, [4, 4])
    labels = torch.where((given["attention_mask"] == 1) & (given["input_ids"] < 50), given["input_ids"], -100)
    quota = wrapped(kind, model)
    with torch.no_grad():
        stock, ours = model(**given, labels=labels), quota(**given, labels=labels, frame_scores=[EVEN, EVEN])
        assert torch.equal(stock.logits, ours.logits)
        assert torch.equal(stock.loss, ours.loss)
        if pad == "left":
            more = {"do_sample": False, "max_new_tokens": 5, "num_beams": 2}
            assert torch.equal(
                model.generate(**given, **more), quota.generate(**given, frame_scores=[EVEN, EVEN], **more)
            )


@pytest.mark.parametrize("kind", FAMILIES)
def test_sampling(kind: str) -> None:
    model, given = build(kind), one_video(kind)
    more = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5, "top_k": 20}
    torch.manual_seed(0)
    stock = model.generate(**given, **more)
    torch.manual_seed(0)
    assert torch.equal(wrapped(kind, model).generate(**given, frame_scores=EVEN, **more), stock)
    assert len({tuple(row) for row in stock.tolist()}) > 1


@pytest.mark.parametrize("kind", ["onevision", "next"])
def test_merging_to_the_own_count_and_the_native_grid(kind: str) -> None:
    """Merging starts from the model's own tokens, so at the full count it changes nothing."""
    model, given = build(kind), one_video(kind)
    with torch.no_grad():
        quota = vtoken.QuotaVideoModel(model, mode="merge")
        call = quota.prepare(**given, frame_scores=EVEN)
        assert call.reports[0].tokens_per_frame == (GRID[kind],) * 4
        assert torch.equal(quota(**given, frame_scores=EVEN).logits, model(**given).logits)


@pytest.mark.parametrize("kind", QWEN)
def test_prompts_without_token_types(kind: str) -> None:
    """The models then count positions along one axis, or refuse; so do we."""
    model, given = build(kind), one_video(kind)
    del given["mm_token_type_ids"]
    quota = wrapped(kind, model)
    with torch.no_grad():
        if kind == "qwen2_5":
            assert torch.equal(quota(**given, frame_scores=EVEN).logits, model(**given).logits)
        else:
            for wants in (model, functools.partial(quota, frame_scores=EVEN)):
                with pytest.raises(ValueError, match="mm_token_type_ids"):
                    wants(**given)
        assert torch.equal(quota.generate(**given, frame_scores=EVEN, **GREEDY), model.generate(**given, **GREEDY))


def test_positions_at_the_full_grid_are_the_models_own() -> None:
    for kind in QWEN:
        model, given = build(kind), one_video(kind)
        call = wrapped(kind, model).prepare(**given, frame_scores=EVEN)
        names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
        if kind != "qwen2_5":
            names = names[:3]
        own, deltas = model.model.get_rope_index(**{name: given[name] for name in names})
        assert torch.equal(call["position_ids"][1:], own)
        assert torch.equal(call["position_ids"][0], torch.arange(own.shape[2])[None])
        behind = own[:, :, -1].amax(0, keepdim=True).T + 1 - own.shape[2]  # text goes on from the last word
        assert torch.equal(model.model.rope_deltas, behind)
        assert kind == "qwen2_5" or torch.equal(behind, deltas)


@pytest.mark.parametrize("kind", FAMILIES)
def test_vision_chunks_and_kept_features(kind: str) -> None:
    """Frames do not see each other in the tower: any chunk gives the same features, up to the order of sums."""
    model, given = build(kind), one_video(kind)
    for chunk in (1, 2, 3, None):
        quota = wrapped(kind, model, vision_chunk=chunk)
        with torch.no_grad():
            logits = model(**given).logits
            assert torch.allclose(quota(**given, frame_scores=EVEN).logits, logits, atol=1e-4)
            features = quota.encode_video(**given)
            text = {name: v for name, v in given.items() if "video" not in name and "second" not in name}
            assert torch.allclose(quota(**text, features=features, frame_scores=EVEN).logits, logits, atol=1e-4)
    quota = wrapped(kind, model)
    with torch.no_grad():
        features = quota.encode_video(**given).to("cpu")
        assert torch.equal(quota(**text, features=features, frame_scores=EVEN).logits, logits)
        for budget, scores in ((5, [0.1, 0.9, 0.4, 0.3]), (11, [0.9, 0.1, 0.1, 0.1])):  # one video, many questions
            quota.budget = budget
            direct = quota.generate(**given, frame_scores=scores, **GREEDY)
            assert torch.equal(quota.generate(**text, features=features, frame_scores=scores, **GREEDY), direct)
