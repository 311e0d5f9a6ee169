"""The recipe of docs/tasks/long_video.md, and a video question from file to answer, with a real processor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vtoken

pytest.importorskip("transformers")

from tests.video import answering

PAGE = Path(__file__).resolve().parents[2] / "docs/tasks/long_video.md"
PROMPT = "<s>user: <video> which dog ?</s><s>assistant:"
SCORES = [0.1, 0.9, 0.2, 0.4, 0.3, 0.1]


def asked(frames: Any) -> Any:
    return answering.processor()(text=PROMPT, videos=[frames], return_tensors="pt")


def test_the_sample_runs(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from tests.video.clips import write_clip

    path = tmp_path / "clip.mp4"
    write_clip(path, 6)
    [snippet] = [text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
                 if "LVLMScorer" in text]  # fmt: skip
    names: dict[str, Any] = {
        "vtoken": vtoken, "path": path, "processor": answering.processor(), "model": answering.model(),
        "prompt": PROMPT, "question": "Which dog is that?",
    }  # fmt: skip
    exec(compile(snippet, str(PAGE), "exec"), names)
    with vtoken.tracing(names["quota"]) as record:
        names["quota"](**names["inputs"], frame_scores=SCORES)
    assert record.video is not None
    report = record.video.reports[0]
    assert report.frames == 6
    assert report.content_tokens == round(0.25 * 6 * 25 + 0.001)
    assert torch.equal(names["ids"][:, : names["inputs"]["input_ids"].shape[1]], names["inputs"]["input_ids"])


def test_a_real_processor_fits() -> None:
    rng = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 255, (6, 60, 80, 3), generator=rng, dtype=torch.uint8).numpy()
    inputs, model = asked(frames), answering.model()
    greedy: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    assert int((inputs["input_ids"] == model.config.video_token_id).sum()) == 6 * 25 + 1
    with torch.no_grad():
        quota = vtoken.QuotaVideoModel(model, budget=1.0)
        assert torch.equal(quota(**inputs, frame_scores=[1.0] * 6).logits, model(**inputs).logits)
        assert torch.equal(quota.generate(**inputs, frame_scores=[1] * 6, **greedy), model.generate(**inputs, **greedy))
        scorer = vtoken.video.LVLMScorer(model, answering.processor())
        asking = vtoken.QuotaVideoModel(model, budget=37, scorer=scorer)
        with vtoken.tracing(asking) as record:
            answer = asking.generate(**inputs, frames=frames, query="Which dog is that?", **greedy)
        assert record.video is not None
        report = record.video.reports[0]
        found = scorer.score(list(frames), vtoken.video.Clue("query", (), "Which dog is that?"))
        assert report.scores == tuple(found.tolist())
        assert len(set(report.tokens_per_frame)) > 1
        assert sum(report.tokens_per_frame) == 37
        again = vtoken.QuotaVideoModel(model, budget=37).generate(**inputs, frame_scores=found, **greedy)
        assert torch.equal(answer, again)
