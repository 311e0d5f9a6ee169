"""Captioned digits and garments: what they hold, that draws repeat, and the zero-shot measure against a slow one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtoken.demo import captions as module
from vtoken.demo.captions import (
    CONTEXT,
    DIGITS,
    GARMENTS,
    CaptionTask,
    digit_task,
    garment_task,
    read_digits,
    small_clip,
    tokenize,
    zero_shot_accuracy,
)
from vtoken.demo.clutter import DATA, read_fashion_mnist
from vtoken.errors import ConfigError, VTokenError

needs_digits = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")
needs_garments = pytest.mark.skipif(not DATA.is_dir(), reason="needs the Debian package dataset-fashion-mnist")


def test_tokens_name_words_and_end_with_the_largest() -> None:
    ids, vocabulary = tokenize(["a photo of a cat", "a dog"])
    assert vocabulary == 7  # padding, five words, end
    assert ids.shape == (2, CONTEXT)
    words = dict(zip(["a", "photo", "of", "a", "cat"], ids[0].tolist(), strict=False)) | {"dog": int(ids[1, 1])}
    assert sorted(words.values()) == [1, 2, 3, 4, 5]
    assert ids[0].tolist() == [words[w] for w in ["a", "photo", "of", "a", "cat"]] + [6, 0, 0]
    assert ids[1].tolist() == [words["a"], words["dog"], 6, 0, 0, 0, 0, 0]
    with pytest.raises(ConfigError, match="8 words"):
        tokenize(["one two three four five six seven eight"])


@needs_digits
def test_digits_are_those_of_scikit_learn() -> None:
    pictures, labels = read_digits()
    assert pictures.shape == (1797, 8, 8)
    assert (float(pictures.min()), float(pictures.max())) == (-1, 1)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (pictures[0, 0] * 8 + 8).tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_missing_and_damaged_digits_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"vtoken\[demo\]"):
        read_digits()
    spec = importlib.util.spec_from_loader("sklearn", None, is_package=True)
    assert spec is not None
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(VTokenError, match="missing or damaged"):
        read_digits()
    (tmp_path / "datasets" / "data").mkdir(parents=True)
    (tmp_path / "datasets" / "data" / "digits.csv.gz").write_bytes(b"no archive")
    with pytest.raises(VTokenError, match="missing or damaged"):
        read_digits()


def check_task(task: CaptionTask, train: int, test: int, names: tuple[str, ...]) -> None:
    assert task.images.shape == (test, 3, task.size, task.size)
    assert task.labels.shape == (test,)
    assert task.size // task.patch == 8
    assert len(task.captions) == len(names) == 10
    assert len({tuple(row) for row in task.captions.tolist()}) == 10
    images, labels = task.draw(train, torch.Generator().manual_seed(3))
    again, same = task.draw(train, torch.Generator().manual_seed(3))
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    assert images.shape == (train, 3, task.size, task.size)
    assert -1 <= float(images.min()) < float(images.max()) <= 1
    assert set(labels.tolist()) == set(range(10))


@needs_digits
def test_digit_task() -> None:
    task = digit_task()
    check_task(task, 200, 397, DIGITS)
    # No test picture is drawn for training (a few are pixel for pixel those of another writer: none here).
    seen = {
        tuple(row) for row in task.draw(20000, torch.Generator().manual_seed(0))[0][:, 0, ::4, ::4].flatten(1).tolist()
    }
    tests = [tuple(row) for row in task.images[:, 0, ::4, ::4].flatten(1).tolist()]
    assert len(seen) > 1350
    assert not seen & set(tests)


@needs_garments
def test_garment_task() -> None:
    task = garment_task(test=100)
    check_task(task, 200, 100, GARMENTS)
    assert torch.equal(task.images, garment_task(test=100).images)
    # The whole garment lies on grey: the canvas's difference from grey sums to the garment's.
    images, labels = read_fashion_mnist("test")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:100]
    assert torch.equal(task.labels, labels[chosen])
    expected = (images[chosen].double() / 127.5 - 1).sum((1, 2))
    torch.testing.assert_close(task.images[:, 0].double().sum((1, 2)), expected, atol=1e-3, rtol=0)


class _Oracle(nn.Module):
    """Features of pictures and captions are looked up."""

    def __init__(self, pictures: Tensor, captions: Tensor) -> None:
        super().__init__()
        self.pictures, self.captions = pictures, captions

    def encode_text(self, ids: Tensor, normalize: bool = False) -> Tensor:
        assert not self.training
        return F.normalize(self.captions, dim=-1) if normalize else self.captions

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        features = self.pictures[images[:, 0, 0, 0].long()]
        return F.normalize(features, dim=-1) if normalize else features


def test_zero_shot_accuracy_against_a_slow_one() -> None:
    draw = torch.Generator().manual_seed(0)
    pictures, captions = torch.randn(450, 5, generator=draw), torch.randn(10, 5, generator=draw)
    captions *= torch.arange(1, 11)[:, None]  # lengths must not matter
    labels = torch.randint(10, (450,), generator=draw)
    images = torch.arange(450.0)[:, None, None, None].expand(-1, 3, 1, 1)
    right = 0
    for picture, label in zip(pictures, labels, strict=True):
        cosines = [float(F.cosine_similarity(picture, caption, dim=0)) for caption in captions]
        right += cosines.index(max(cosines)) == int(label)
    any_task: Any = CaptionTask("", 1, 1, torch.zeros(10, 8), 2, lambda n, g: (images, labels), images, labels)
    model = _Oracle(pictures, captions).train()
    assert zero_shot_accuracy(model, any_task) == pytest.approx(right / 450, abs=1e-6)
    assert 0 < right < 450
    assert model.training


@needs_garments
def test_small_clip_fits_its_task() -> None:
    task = garment_task(test=50)
    model = small_clip(task)
    out = model(task.images[:4], task.captions[:4])
    assert out["image_features"].shape == out["text_features"].shape == (4, 32)
    assert 0 <= zero_shot_accuracy(model, task) <= 1
