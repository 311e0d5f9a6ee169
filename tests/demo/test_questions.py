"""Questions in words: what is asked, what is to be answered, several at once, and the trained LLaVA's answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vtoken.demo.clutter import DATA
from vtoken.demo.questions import (
    ANSWERS,
    IDS,
    IGNORED,
    KINDS,
    VOCABULARY,
    WEIGHTS,
    ask,
    load_small_llava,
    prompt,
    side_by_side,
)
from vtoken.demo.scenes import SMALL_KINDS, Material, Scenes
from vtoken.errors import ConfigError

pytest.importorskip("transformers")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the Debian package dataset-fashion-mnist")


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Material("test").draw(100, torch.Generator().manual_seed(5))


def test_a_word_a_token() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert [VOCABULARY[IDS[word]] for word in VOCABULARY] == list(VOCABULARY)
    assert {word for words in ANSWERS.values() for word in words} <= set(VOCABULARY)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_and_answers_in_words(kind: str, scenes: Scenes) -> None:
    which = torch.arange(100) % len(SMALL_KINDS)
    ids, labels = ask(kind, scenes, which if kind == "count" else None)
    assert ids.shape == labels.shape
    for n in range(100):
        name = list(SMALL_KINDS)[which[n]]
        words, known = list[str](), True
        for turn in KINDS[kind]:
            fact = turn.fact.replace("{}", name)
            value = int(scenes.facts[fact][n])
            known = known and value >= 0
            words += [*turn.question.replace("{}", name).split(), ANSWERS[fact][max(value, 0)]]
        assert [VOCABULARY[i] for i in ids[n]] == words
        expected = [IDS[after] if word == "?" else IGNORED for word, after in zip(words, [*words[1:], ""], strict=True)]
        expected[-1] = IDS["</s>"]
        assert labels[n].tolist() == (expected if known else [IGNORED] * len(words))


def test_the_tag_is_asked_for_only_where_there_is_one(scenes: Scenes) -> None:
    _, labels = ask("digit, then place", scenes)
    unclear = scenes.facts["tag place"] < 0
    assert unclear.any()
    assert torch.equal((labels == IGNORED).all(1), unclear)


@pytest.mark.parametrize("kept", [196, 12])
def test_side_by_side_is_one_after_the_other(kept: int, scenes: Scenes) -> None:
    """Every conversation, its first turn too, by a plain call of its own."""
    model = load_small_llava()
    features = torch.randn(3, kept, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    few = Scenes(scenes.pictures[:3], scenes.boxes[:3], scenes.patches[:3], {k: v[:3] for k, v in scenes.facts.items()})
    texts = [ask(kind, few)[0] for kind in KINDS]
    table = model.get_input_embeddings()
    with torch.no_grad():
        for ids, found in zip(texts, side_by_side(model, features, texts), strict=True):
            whole = table(prompt(ids, kept))
            whole[:, 1 : 1 + kept] = features
            torch.testing.assert_close(found, model(inputs_embeds=whole).logits[:, 1 + kept :], atol=1e-4, rtol=1e-4)


def test_tokens_and_texts_are_numbered_as_told(scenes: Scenes) -> None:
    """By a plain call whose positions are given, one picture at a time: each keeps other tokens."""
    model, generator = load_small_llava(), torch.Generator().manual_seed(0)
    features = torch.randn(3, 5, model.config.text_config.hidden_size, generator=generator)
    places = torch.stack([torch.randperm(30, generator=generator)[:5].sort().values for _ in range(3)])
    few = Scenes(scenes.pictures[:3], scenes.boxes[:3], scenes.patches[:3], {k: v[:3] for k, v in scenes.facts.items()})
    texts = [ask(kind, few)[0] for kind in KINDS]
    with torch.no_grad():
        for ids, found in zip(texts, side_by_side(model, features, texts, places, 30), strict=True):
            whole = model.get_input_embeddings()(prompt(ids, 5))
            whole[:, 1:6] = features
            for n in range(3):
                numbers = torch.cat([torch.tensor([0]), 1 + places[n], 31 + torch.arange(ids.shape[1])])[None]
                plain = model(inputs_embeds=whole[n : n + 1], position_ids=numbers).logits[0, 6:]
                torch.testing.assert_close(found[n], plain, atol=1e-4, rtol=1e-4)


def test_a_missing_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"examples/train_llava\.py"):
        load_small_llava(tmp_path)


def test_the_shipped_model_answers(scenes: Scenes) -> None:
    """On pictures that it never saw, every kind about as often as its training says, and far above chance."""
    model, said = load_small_llava(), json.loads((WEIGHTS / "training.json").read_text())["right"]
    asked = [ask(kind, scenes) for kind in KINDS]
    with torch.no_grad():
        features = torch.stack(list(model.model.get_image_features(pixel_values=scenes.pictures).pooler_output))
        found = side_by_side(model, features, [ids for ids, _ in asked])
    for kind, logits, (_, labels) in zip(KINDS, found, asked, strict=True):
        answers = labels[labels[:, -2] >= 0, -2]
        right = float((logits[labels[:, -2] >= 0, -2].argmax(-1) == answers).float().mean())
        spread = (said[kind] * (1 - said[kind]) / len(answers)) ** 0.5
        assert abs(right - said[kind]) < 4 * spread + 0.01, kind
        most_frequent = float(answers.bincount().max() / len(answers))
        assert said[kind] - 2 * spread > most_frequent, kind


def test_the_shipped_model_generates(scenes: Scenes) -> None:
    """A word and the end, as it says when several questions go side by side."""
    model = load_small_llava()
    ids, _ = ask("object", scenes)
    with torch.no_grad():
        pixels = scenes.pictures[:4]
        out = model.generate(input_ids=prompt(ids[:4, :-1], 196), pixel_values=pixels, max_new_tokens=2)
        features = torch.stack(list(model.model.get_image_features(pixel_values=pixels).pooler_output))
        (logits,) = side_by_side(model, features, [ids[:4]])
    assert torch.equal(out[:, -2], logits[:, -2].argmax(-1))
    assert (out[:, -1] == IDS["</s>"]).all()


def test_the_shipped_processor_makes_the_same_prompt(scenes: Scenes) -> None:
    transformers = pytest.importorskip("transformers")
    pillow = pytest.importorskip("PIL.Image")
    processor = transformers.AutoProcessor.from_pretrained(WEIGHTS)
    picture = ((scenes.pictures[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    given = processor(images=pillow.fromarray(picture), text="<image> what is the garment ?", return_tensors="pt")
    ids, _ = ask("object", scenes)
    assert torch.equal(given["input_ids"], prompt(ids[:1, :-1], 196))
    torch.testing.assert_close(given["pixel_values"], scenes.pictures[:1], atol=1e-6, rtol=0)
