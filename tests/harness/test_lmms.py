"""lmms-eval's model `vtoken`, by lmms-eval itself where it is installed, else by a stand-in with the same calls."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vtoken

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from tests.video.answering import model as tiny_model
from tests.video.answering import processor as tiny_processor


@dataclasses.dataclass(frozen=True)
class Manifest:
    """As lmms-eval's `ModelManifest`."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Base:
    """As lmms-eval's `lmms`."""

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}


@dataclasses.dataclass
class Request:
    """As lmms-eval's `Instance`."""

    args: tuple[Any, ...]


@pytest.fixture(name="harness")
def _harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module under test."""
    if importlib.util.find_spec("lmms_eval") is None:
        names = (
            "lmms_eval",
            "lmms_eval.api",
            "lmms_eval.api.model",
            "lmms_eval.models",
            "lmms_eval.models.registry_v2",
        )
        for name in names:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["lmms_eval.api.model"].lmms = Base  # type: ignore[attr-defined]
        sys.modules["lmms_eval.models.registry_v2"].ModelManifest = Manifest  # type: ignore[attr-defined]
    yield importlib.import_module("vtoken.harness.lmms")
    sys.modules.pop("vtoken.harness.lmms")


@pytest.fixture(name="checkpoint", scope="module")
def _checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def picture(seed: int) -> Any:
    pixels = torch.randint(256, (54, 54, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def messages(doc: dict[str, Any]) -> Any:
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


DOCS = [{"image": picture(i), "question": "is the dog red ?" if i % 2 else "can any cat be seen in the picture"}
        for i in range(3)]  # fmt: skip


def requests(**options: Any) -> list[Request]:
    options = {"max_new_tokens": 4, "temperature": 0} | options
    return [Request(("", messages, options, doc, "task", "test")) for doc in range(len(DOCS))]


def loaded(harness: Any, checkpoint: Path, **options: Any) -> Any:
    model = harness.ReducedModel(str(checkpoint), device="cpu", **options)
    model.task_dict = {"task": {"test": DOCS}}
    return model


def answered(model: Any, processor: Any) -> list[str]:
    """What the model answers when it is called by hand, one prompt at a time."""
    answers = []
    for doc in DOCS:
        told = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": doc["question"]}]}]
        text = processor.apply_chat_template(told, add_generation_prompt=True)
        inputs = processor(text=text, images=doc["image"], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("batch", [1, 2])
def test_answers_are_those_of_the_patched_model(harness: Any, checkpoint: Path, batch: int) -> None:
    by_hand = vtoken.apply(tiny_model().eval(), "vtc_cls", keep_ratio=0.25)
    expected = answered(by_hand, tiny_processor())
    model = loaded(harness, checkpoint, method="vtc_cls", keep_ratio=0.25, batch_size=batch)
    assert vtoken.config_of(model.model) == vtoken.VTCCLS(keep_ratio=0.25)
    assert model.generate_until(requests()) == expected
    assert expected != answered(tiny_model().eval(), tiny_processor()), "the method was to matter"
    first = expected[0].split()[0]
    assert model.generate_until(requests(until=[first]))[0] == ""


def test_the_plain_model_is_measured_when_it_is_asked_for(harness: Any, checkpoint: Path) -> None:
    model = loaded(harness, checkpoint, method="none")
    assert not vtoken.is_applied(model.model)
    assert model.generate_until(requests()) == answered(tiny_model().eval(), tiny_processor())


def test_settings_of_the_checkpoint(harness: Any, checkpoint: Path, tmp_path: Path) -> None:
    saved = vtoken.apply(tiny_model(), "vtc_cls", keep_ratio=0.5)
    saved.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    assert vtoken.config_of(loaded(harness, tmp_path, method="saved").model) == vtoken.VTCCLS(keep_ratio=0.5)
    with pytest.raises(vtoken.VTokenError, match="nothing to restore"):
        loaded(harness, checkpoint, method="saved")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "method=none measures the plain model"),
        ({"method": "vtc_cls", "keep_ration": 0.5}, "keep_ratio"),
        ({"method": "vtc_clss"}, "vtc_cls"),
        ({"method": "none", "keep_ratio": 0.5}, "takes no settings"),
        ({"method": "none", "batch_size": "auto"}, "one whole number"),
        ({"method": "pitome", "ratio": 0.9}, "tiles"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(
    harness: Any, checkpoint: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(vtoken.VTokenError, match=words):
        loaded(harness, checkpoint, **options)


def test_nothing_is_scored_that_was_not_answered(harness: Any, checkpoint: Path) -> None:
    model = loaded(harness, checkpoint, method="vtc_cls", keep_ratio=0.25)

    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    model.model.generate = broken
    with pytest.raises(RuntimeError, match="out of memory"):
        model.generate_until(requests())
    del model.model.generate
    video = [Request(("", lambda doc: [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}],
                      {}, 0, "task", "test"))]  # fmt: skip
    with pytest.raises(vtoken.InputError, match="video"):
        model.generate_until(video)
    with pytest.warns(vtoken.VTokenWarning, match="image_aspect_ratio"):
        model.generate_until(requests(image_aspect_ratio="pad")[:1])
    for name in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match="not served"):
            getattr(model, name)(requests())


def test_lmms_eval_finds_the_model(harness: Any) -> None:
    manifest = importlib.import_module("vtoken.harness.manifest")
    told = manifest.lmms()
    assert (told.model_id, told.simple_class_path) == ("vtoken", None)
    module, _, name = told.chat_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is harness.ReducedModel
    text = (Path(vtoken.__file__).resolve().parents[1] / "pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]\nvtoken = "vtoken.harness.manifest:lmms"\n' in text
