"""Methods in the tower and on the images of the same model, separators, and adapters of the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
from vtoken.core import host
from vtoken.hosts.llava.video import Onevision
from vtoken.prompts.family import Family

pytest.importorskip("transformers")

from tests.helpers import assert_close
from tests.quota.builders import IMAGE, VIDEO, build, one_video, prompt, rows_given, run, video_inputs
from tests.quota.by_hand import by_hand, logits_of, widths

SCORES = [0.1, 0.9, 0.4, 0.3]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize("kind", ["onevision", "next"])
@pytest.mark.parametrize("name", ["pitome", "tome", "random_prune"])
def test_merging_towers(kind: str, name: str) -> None:
    """Every patch of a frame shows the token that it became part of; the frame keeps its grid."""
    model, given = build(kind), one_video(kind)
    plain = vtoken.QuotaVideoModel(model, budget=13)
    with torch.no_grad():
        stock = plain(**given, frame_scores=SCORES).logits
        vtoken.apply(model.model.vision_tower, name, ratio=0.8)
        with vtoken.tracing(plain) as record:
            merged = plain(**given, frame_scores=SCORES).logits
        assert record.tokens[-1] < record.tokens[0] == {"onevision": 81, "next": 65}[kind]
        assert record.num_forwards == 1
        assert record.video is not None
        assert record.video.reports[0].content_tokens == 13
        assert merged.shape == stock.shape
        assert not torch.allclose(merged, stock, atol=1e-2), "merging must have happened"
        features = plain.encode_video(**given)
        assert_close("dense", by_loop(kind, model, given), features.grid, 1e-5)
        ids = plain.generate(**given, frame_scores=SCORES, **GREEDY)
        assert ids.shape[1] == given["input_ids"].shape[1] + 4
        vtoken.configure(model.model.vision_tower, ratio=1.0)
        assert torch.equal(plain(**given, frame_scores=SCORES).logits, stock), "merging nothing is exact"
        vtoken.remove(model)
        assert torch.equal(plain(**given, frame_scores=SCORES).logits, stock)


def by_loop(kind: str, model: Any, given: dict[str, Tensor]) -> Tensor:
    """Features frame by frame: the tower's rows, each put at all patches that the trace says it stands for."""
    found = []
    layer = model.config.vision_feature_layer
    for frame in given["pixel_values_videos"][0]:
        with vtoken.tracing(model.model.vision_tower) as trace:
            states = model.model.vision_tower(frame[None], output_hidden_states=True).hidden_states
        index = layer % len(states)
        dest = trace.layer_dest[index - 1][0].tolist()
        rows = torch.stack([states[index][0, d] for d in dest])
        rows = model.model.multi_modal_projector(rows) if kind == "onevision" else rows[1:]
        side = {"onevision": 9, "next": 8}[kind]
        found.append(rows.view(side, side, -1))
    return torch.stack(found)


def test_internal_order_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = build("onevision"), one_video("onevision")
    vtoken.apply(model.model.vision_tower, vtoken.ToMe(ratio=0.8, order="internal"))
    quota = vtoken.QuotaVideoModel(model, budget=13)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("something ran")

    monkeypatch.setattr(type(model.model.vision_tower), "forward", never)
    for enter in (quota, quota.generate):
        with pytest.raises(vtoken.ConfigError, match="order='internal'"):
            enter(**given, frame_scores=SCORES)
    with pytest.raises(vtoken.ConfigError, match="order='internal'"):
        quota.encode_video(**given)


@pytest.mark.parametrize("kind", ["onevision", "next"])
def test_images_cannot_be_packed_from_merged_tokens(kind: str) -> None:
    """The models lay tiles of an image on a grid; said before anything runs."""
    model, given = build(kind), one_video(kind)
    vtoken.apply(model.model.vision_tower, vtoken.PiToMe(ratio=0.8))
    quota = vtoken.QuotaVideoModel(model, budget=13)
    with pytest.raises(vtoken.ConfigError, match=r"images of .* are packed on a grid, which merged tokens"):
        quota(**given, **picture()[0], frame_scores=SCORES)
    vtoken.configure(model.model.vision_tower, ratio=1.0)
    quota(**given, frame_scores=SCORES)


@pytest.mark.parametrize("kind", ["qwen2_5", "qwen3", "llama3"])
def test_towers_that_methods_refuse_stay_refused(kind: str) -> None:
    quota = vtoken.QuotaVideoModel(build(kind), budget=13)
    with pytest.raises(vtoken.UnsupportedModelError):
        vtoken.apply(quota.model, vtoken.PiToMe(ratio=0.9))
    assert not vtoken.is_applied(quota)


def picture() -> tuple[dict[str, Tensor], int]:
    rng = torch.Generator().manual_seed(5)
    return {"pixel_values": torch.randn(1, 2, 3, 54, 54, generator=rng), "image_sizes": torch.tensor([[54, 54]])}, 171


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_vtc_cls_on_images_and_quota_on_videos(positions: str) -> None:
    model = build("onevision")
    pixels, count = picture()
    only_image = prompt("onevision", [[3, [IMAGE] * count, 7, 8]]) | pixels
    both = prompt("onevision", [[3, [IMAGE] * count, 7, 4, run("onevision", 4), 9]]) | pixels
    both |= video_inputs("onevision", [4])
    quota = vtoken.QuotaVideoModel(model, budget=13)
    with torch.no_grad():
        alone = quota(**one_video("onevision"), frame_scores=SCORES).logits
        vtoken.apply(model, vtoken.VTCCLS(num_tokens=6, positions=positions))
        assert torch.equal(quota(**one_video("onevision"), frame_scores=SCORES).logits, alone)
        assert torch.equal(quota(**only_image).logits, model(**only_image).logits), "images alone: the model's own call"
        if positions == "original":
            with pytest.raises(vtoken.ConfigError, match="use positions='compact'"):
                quota(**both, frame_scores=SCORES)
            return
        with vtoken.tracing(quota) as record:
            out = quota(**both, frame_scores=SCORES)
        prompt_record, video_record = record.prompt, record.video
        assert prompt_record is not None
        assert video_record is not None
        kept = prompt_record.lengths[0]
        assert kept < count
        ids = video_record.input_ids
        assert out.logits.shape[1] == ids.shape[1] == 1 + kept + 2 + 13 + 1 + 1
        assert int((ids == IMAGE).sum()) == kept
        assert torch.equal(both["input_ids"].gather(1, video_record.index), ids)
        # By hand: image rows chosen by VTC-CLS's record, video tokens one at a time.
        rows = model.model.get_image_features(**pixels).pooler_output[0][prompt_record.kept[0]]
        counts = [list(video_record.reports[0].tokens_per_frame)]
        chosen = prompt("onevision", [[3, [IMAGE] * kept, 7, 4, run("onevision", 4), 9]]) | video_inputs(
            "onevision", [4]
        )
        fed = by_hand("onevision", model, chosen, counts, images=[rows])
        assert_close("logits", logits_of(model, fed), out.logits, 1e-5)
        answer = quota.generate(**both, frame_scores=SCORES, **GREEDY)
        assert torch.equal(answer[:, :-4], both["input_ids"])
        assert int(answer[0, -4]) == int(out.logits[0, -1].argmax())
        vtoken.remove(model)
        images_full = by_hand("onevision", model, both, counts, images=[model.model.get_image_features(**pixels)
                                                                       .pooler_output[0]])  # fmt: skip
        assert_close("removed", logits_of(model, images_full), quota(**both, frame_scores=SCORES).logits, 1e-5)


def test_merging_pruning_and_budgets_together() -> None:
    model, given = build("onevision"), one_video("onevision")
    vtoken.apply(vtoken.apply(model, vtoken.VTCCLS(num_tokens=6)).model.vision_tower, vtoken.PiToMe(ratio=0.9))
    quota = vtoken.QuotaVideoModel(model, budget=13)
    with torch.no_grad():
        together = quota(**given, frame_scores=SCORES).logits
        vtoken.remove(model, "vtc_cls")
        assert torch.equal(quota(**given, frame_scores=SCORES).logits, together)
        assert vtoken.is_applied(quota)
        vtoken.remove(quota)
        assert not torch.equal(quota(**given, frame_scores=SCORES).logits, together)


class RowNewlines(Onevision):
    """LLaVA-Video's layout: a newline after every row of every frame."""

    newline = "row"


class NoNewline(Onevision):
    """Frames and nothing between or after them."""

    newline = "none"


def row_prompt() -> dict[str, Tensor]:
    return prompt("onevision", [[3, [VIDEO] * (4 * 30), 7, 8, 9]]) | video_inputs("onevision", [4])


@pytest.mark.parametrize("mode", ["bilinear", "pool"])
def test_newlines_after_rows(mode: str) -> None:
    model = build("onevision")
    quota = vtoken.QuotaVideoModel(model, budget=23, mode=mode, adapter=RowNewlines())
    given = row_prompt()
    with torch.no_grad():
        report = quota.prepare(**given, frame_scores=SCORES).reports[0]
        rows = [len(widths(t, 9, 9)) for t in report.tokens_per_frame]
        assert report.rows_per_frame == tuple(rows)
        assert (report.content_tokens, report.separator_tokens) == (23, sum(rows))
        assert report.sequence_length_after == 4 + 23 + sum(rows)
        plain = prompt("onevision", [[3, [VIDEO] * 100, 7, 8, 9]]) | video_inputs("onevision", [4])
        fed = by_hand("onevision", model, plain, [list(report.tokens_per_frame)], mode=mode, newline="row")
        assert_close("logits", logits_of(model, fed), quota(**given, frame_scores=SCORES).logits, 1e-5)


def test_no_newlines() -> None:
    model = build("onevision")
    quota = vtoken.QuotaVideoModel(model, budget=23, adapter=NoNewline())
    given = prompt("onevision", [[3, [VIDEO] * 100, 7, 8, 9]]) | video_inputs("onevision", [4])
    with torch.no_grad():
        report = quota.prepare(**given, frame_scores=SCORES).reports[0]
        assert (report.content_tokens, report.separator_tokens, report.sequence_length_after) == (23, 0, 27)
        fed = by_hand("onevision", model, one_video("onevision"), [list(report.tokens_per_frame)])
        last = fed["inputs_embeds"].shape[1] - 4  # by hand there is a newline behind the video
        for name in ("inputs_embeds", "attention_mask"):
            fed[name] = torch.cat([fed[name][:, :last], fed[name][:, last + 1 :]], dim=1)
        assert_close("logits", logits_of(model, fed), quota(**given, frame_scores=SCORES).logits, 1e-5)


@pytest.mark.parametrize("budget", [5, 12, 23, 57, 110, 400])
def test_separators_within_the_budget(budget: int) -> None:
    for adapter, given in ((RowNewlines(), row_prompt()), (Onevision(), one_video("onevision"))):
        quota = vtoken.QuotaVideoModel(build("onevision"), budget=budget, adapter=adapter, count_separators=True)
        report = quota.prepare(**given, frame_scores=SCORES).reports[0]
        total = report.content_tokens + report.separator_tokens
        assert total <= budget
        assert report.separator_tokens > 0
        rows = {"row": sum(report.rows_per_frame), "video": 1}[adapter.newline]
        assert report.separator_tokens == rows
        if adapter.newline == "video":
            assert total == min(budget, 4 * 81 + 1)
        else:  # a row more would not have fitted beside its newline
            assert total >= min(budget, 4 * 90) - 9 * 2
    with pytest.raises(ValueError, match="beside the separators"):
        vtoken.QuotaVideoModel(build("onevision"), budget=1, count_separators=True).prepare(
            **one_video("onevision"), frame_scores=SCORES
        )


def test_modes_without_rows_cannot_have_newlines_after_rows() -> None:
    for mode in ("merge", "stride"):
        with pytest.raises(vtoken.ConfigError, match="has no rows"):
            vtoken.QuotaVideoModel(build("onevision"), mode=mode, adapter=RowNewlines())


@pytest.fixture
def registry() -> Iterator[None]:
    before = list(host._registered)
    yield
    host._registered[:] = before


@pytest.mark.usefixtures("registry")
def test_registered_adapters_are_asked_first() -> None:
    asked: list[str] = []

    @vtoken.register_adapter
    class Mine(NoNewline):
        """Says that it was used."""

        def encode(self, model: Any, *args: Any) -> Any:
            asked.append("encode")
            return super().encode(model, *args)

    assert issubclass(Mine, Family)
    model = build("onevision")
    quota = vtoken.QuotaVideoModel(model, budget=9)
    assert type(quota.adapter) is Mine
    given = prompt("onevision", [[3, [VIDEO] * 100, 7]]) | video_inputs("onevision", [4])
    assert quota(**given, frame_scores=SCORES).logits.shape[1] == 11
    assert asked == ["encode"]
    assert type(vtoken.QuotaVideoModel(build("next")).adapter).__name__ == "NextVideo"
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=5))  # other parts still find their own adapters
    vtoken.apply(model.model.vision_tower, vtoken.PiToMe(ratio=0.9))


@pytest.mark.parametrize("mode", ["merge", "stride"])
def test_other_modes(mode: str) -> None:
    """Against `assign` frame by frame: what enters the model is what it gives, from the right grid."""
    for kind in ("onevision", "next", "qwen2_5"):
        model, given = build(kind), one_video(kind)
        quota = vtoken.QuotaVideoModel(model, budget=13, mode=mode)
        with torch.no_grad():
            call = quota.prepare(**given, frame_scores=SCORES)
            grid = quota.encode_video(**given).grid
            side = {"onevision": 5, "next": 4}.get(kind)
            if mode == "merge" and side:
                image = grid.permute(0, 3, 1, 2)
                small = (torch.nn.functional.interpolate(image, (5, 5), mode="bilinear") if kind == "onevision"
                         else torch.nn.functional.avg_pool2d(image, 2))  # fmt: skip
                grid = small.permute(0, 2, 3, 1)
            counts = call.reports[0].tokens_per_frame
            tokens = torch.cat([vtoken.ops.assign(g, t, mode).tokens for g, t in zip(grid, counts, strict=True)])
            if kind == "next":
                tokens = model.model.multi_modal_projector(tokens)
            assert_close(kind, tokens, rows_given(call)[:13], 1e-5)
            assert sum(counts) == 13
            assert int(quota.generate(**given, frame_scores=SCORES, **GREEDY)[0, -4]) == int(
                quota(**given, frame_scores=SCORES).logits[0, -1].argmax()
            )
