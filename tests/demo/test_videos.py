"""Videos with known contents: questions and answers against slow search, and the shipped model and scorer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vtoken
from vtoken.demo.clutter import DATA
from vtoken.demo.frame_clip import CONTEXT, PAD, UNKNOWN, WORDS, captions, load_frame_clip, preprocess, tokenize
from vtoken.demo.questions import COUNTS, PLACES, side_by_side
from vtoken.demo.scenes import CLOTHES, COLOURS, FIRST_DIGIT, FIRST_KIND, SIDE, SMALL_KINDS, Material, Scenes
from vtoken.demo.videos import (
    CELLS,
    FRAMES,
    GRID,
    KINDS,
    VOCABULARY,
    WEIGHTS,
    Asked,
    ask,
    film,
    load_small_video,
    plan,
    pooled,
    prompt,
    shows,
)
from vtoken.errors import ConfigError
from vtoken.video import CLIPScorer, RuleDecoupler

pytest.importorskip("transformers")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
COUNT = 12


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return film(Material("test"), COUNT, seeded(1))


@pytest.fixture(scope="module")
def facts(scenes: Scenes) -> dict[str, Tensor]:
    return {name: value.view(COUNT, FRAMES) for name, value in scenes.facts.items()}


def asked_of(kind: str, facts: dict[str, Tensor], seed: int = 0) -> tuple[Asked, Tensor]:
    """A question about every video that has an answer, and what it names."""
    there = shows(kind, facts).any(1)
    which = (torch.rand(there.shape, generator=seeded(seed)) + there).argmax(1)
    return ask(kind, facts, which), which


def test_nothing_that_is_asked_for_is_on_two_frames() -> None:
    wanted = plan(300, seeded(0))
    for video in range(300):
        for name, most in (("garment", 6), ("colour", 4)):
            shown = [v for v in wanted[name][video].tolist() if v >= 0]
            assert len(shown) == len(set(shown)) == most
        assert all(g >= 0 for g, c in zip(wanted["garment"][video], wanted["colour"][video], strict=True) if c >= 0)
        for name in SMALL_KINDS:
            assert sorted(wanted[name][video].tolist())[:-1] == [0] * (FRAMES - 1)
            assert 1 <= wanted[name][video].max() <= 3
    places = (wanted["colour"] >= 0).double().mean(0)
    assert ((places - 4 / FRAMES).abs() < 0.1).all(), "needles are anywhere"
    assert torch.equal(wanted["garment"], plan(300, seeded(0))["garment"])


@pytest.mark.parametrize("kind", KINDS)
def test_one_frame_answers_as_its_boxes_say(kind: str, scenes: Scenes, facts: dict[str, Tensor]) -> None:
    """Every frame of every video searched for what the words of the question name."""
    asked, _ = asked_of(kind, facts)
    boxes = scenes.boxes.view(COUNT, FRAMES, -1, 4)
    for n in range(COUNT):
        words = asked.texts[n].split()
        answers = list[str]()
        frames = list[int]()
        for frame in range(FRAMES):
            what = boxes[n, frame, :, 3].tolist()
            row, column, size, _ = boxes[n, frame, 0].tolist()
            if kind == "count":
                amount = what[2:].count(FIRST_KIND + list(SMALL_KINDS).index(words[3]))
                answer = COUNTS[amount] if amount else None
            elif kind == "place":
                third = SIDE / 3
                place = int((row + size / 2) // third) * 3 + int((column + size / 2) // third)
                answer = PLACES[place] if what[0] == 1 + CLOTHES.index(words[3]) else None
            else:
                colour = next(word for word in words if word in COLOURS)
                tag = boxes[n, frame, 1].tolist()
                inside = scenes.pictures.view(COUNT, FRAMES, 3, SIDE, SIDE)[n, frame]
                inside = inside[:, tag[0] + 1 : tag[0] + tag[2] - 1, tag[1] + 1 : tag[1] + tag[2] - 1]
                paper = ((inside.flatten(1).amax(1) + 1) * 127.5).round().tolist() if what[1] else None
                found = list(COLOURS.values()).index(tuple(paper)) if paper else -1
                answer = None
                if found == list(COLOURS).index(colour):
                    digits = KINDS["digit"].answers
                    answer = digits[what[1] - FIRST_DIGIT] if kind == "digit" else CLOTHES[what[0] - 1]
            if answer is not None:
                answers.append(answer)
                frames.append(frame)
        assert frames == [int(asked.needles[n])]
        assert [VOCABULARY[i] for i in asked.ids[n]] == [*words, *answers]
        labels = [VOCABULARY[i] if i >= 0 else "" for i in asked.labels[n]]
        assert labels == [""] * (len(words) - 1) + [*answers, "</s>"]
        assert all(word in asked.texts[n].split() for word in asked.clues[n].split())


def test_what_no_frame_shows_is_not_asked(facts: dict[str, Tensor]) -> None:
    absent = shows("place", facts).any(1).to(torch.uint8).argmin(1)
    asked = ask("place", facts, absent)
    assert (asked.needles == -1).all()
    assert (asked.labels == -100).all()


def test_pooling_is_the_library_s(facts: dict[str, Tensor]) -> None:
    patches = torch.randn(2, 3, GRID**2, 5)
    counts = [[0, 196, 7], [100, 50, 53]]
    found = pooled(patches, counts)
    for video, row, got in zip(patches, counts, found, strict=True):
        grids = [grid.view(GRID, GRID, 5) for grid in video]
        rows = [vtoken.ops.assign(g, t, mode="pool").tokens for g, t in zip(grids, row, strict=True)]
        torch.testing.assert_close(got, torch.cat(rows))


def test_captions_say_what_is_true(scenes: Scenes) -> None:
    texts, true = captions(scenes.facts)
    assert len(set(texts)) == len(texts)
    for n in range(0, len(scenes.pictures), 7):
        said = {text for text, there in zip(texts, true[n], strict=True) if there}
        what = scenes.boxes[n, :, 3].tolist()
        assert ("only a photograph" in said) == (not any(what))
        assert [cloth for cloth in CLOTHES if f"a {cloth}" in said] == ([CLOTHES[what[0] - 1]] if what[0] else [])
        assert ("a digit on a tag" in said) == bool(what[1])
        for kind, name in enumerate(SMALL_KINDS):
            amount = what[2:].count(FIRST_KIND + kind)
            assert (f"small {name}" in said) == (amount > 0)
            assert [n for n in range(1, 4) if f"{COUNTS[n]} small {name}" in said] == ([amount] if amount else [])


def test_words_become_numbers() -> None:
    first, second = tokenize(["What digit is on the red tag?", "zebra " * 20]).tolist()
    assert [WORDS[i] for i in first] == ["<unknown>", "digit", "is", "on", "the", "red", "tag", *["<pad>"] * 5]
    assert second == [UNKNOWN] * CONTEXT
    assert tokenize(["?"]).tolist() == [[UNKNOWN] + [PAD] * (CONTEXT - 1)]


def test_missing_weights_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"examples/train_video\.py"):
        load_small_video(tmp_path)
    with pytest.raises(ConfigError, match=r"examples/train_video\.py"):
        load_frame_clip(None, tmp_path / "scorer.safetensors")


@pytest.fixture(scope="module")
def seen(scenes: Scenes) -> Tensor:
    """Patches of the shipped tower, [COUNT, FRAMES, 196, C]."""
    tower = load_small_video().model.vision_tower
    with torch.no_grad():
        patches = tower(pixel_values=scenes.pictures).last_hidden_state[:, 1:]
    return patches.unflatten(0, (COUNT, FRAMES))


def test_the_shipped_model_answers(seen: Tensor, facts: dict[str, Tensor]) -> None:
    """With its usual tokens, about as often as its training says."""
    model = load_small_video()
    said = json.loads((WEIGHTS / "training.json").read_text())["model"]["right, evenly spread, by tokens"]
    rows = pooled(seen, [[CELLS] * FRAMES] * COUNT)
    asked = [asked_of(kind, facts)[0] for kind in KINDS]
    with torch.no_grad():
        found = side_by_side(model, model.model.multi_modal_projector(rows), [one.ids for one in asked])
    for one, logits in zip(asked, found, strict=True):
        right = float((logits[:, -2].argmax(-1) == one.labels[:, -2]).float().mean())
        share = said[str(FRAMES * CELLS)][one.kind]
        assert abs(right - share) < 4 * (share * (1 - share) / COUNT) ** 0.5 + 0.02, one.kind


def test_the_shipped_model_is_one_that_a_budget_serves(scenes: Scenes, facts: dict[str, Tensor]) -> None:
    """A word and the end, from a quarter of the tokens, all on the frame that answers."""
    model, (asked, _) = load_small_video(), asked_of("digit", facts)
    quota = vtoken.QuotaVideoModel(model, budget=0.25, mode="pool")
    pixels = scenes.pictures.unflatten(0, (COUNT, FRAMES))[:1]
    scores = (torch.arange(FRAMES) == asked.needles[0]).float()
    with vtoken.tracing(quota) as record:
        out = quota.generate(
            input_ids=prompt(asked.ids[:1, :-1], FRAMES * CELLS), pixel_values_videos=pixels, frame_scores=scores,
            max_new_tokens=2,
        )  # fmt: skip
    assert record.video.reports[0].tokens_per_frame[int(asked.needles[0])] == FRAMES * CELLS // 4
    assert VOCABULARY[out[0, -2]] in KINDS["digit"].answers
    assert VOCABULARY[out[0, -1]] == "</s>"


def test_the_shipped_scorer_finds_the_needle(scenes: Scenes, facts: dict[str, Tensor]) -> None:
    """By the library's own scorer, from pictures and words."""
    scorer = CLIPScorer(load_frame_clip(load_small_video().model.vision_tower), tokenize, preprocess)
    said = json.loads((WEIGHTS / "training.json").read_text())["scorer"]["needle scores highest"]
    frames = ((scenes.pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    asked, _ = asked_of("digit", facts)
    hits = 0
    for n in range(COUNT):
        clue = RuleDecoupler().decouple(asked.clues[n])
        assert clue.items == (asked.clues[n],)
        scores = scorer.score(list(frames[n * FRAMES : (n + 1) * FRAMES]), clue)
        hits += int(scores.argmax()) == int(asked.needles[n])
    share = said["digit"]["clue"]
    assert share > 0.5
    assert abs(hits / COUNT - share) < 4 * (share * (1 - share) / COUNT) ** 0.5 + 0.02
