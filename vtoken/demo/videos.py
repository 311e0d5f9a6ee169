"""Videos whose contents are known, and questions that one frame of each answers.

A video is a row of pictures as `vtoken.demo.scenes` makes them, with fewer things on each: some frames show a garment,
most of these a coloured tag with a digit as well, some show small garments of one kind, and the rest a photograph
alone. No garment, no colour and no kind of small garments is on two frames, so what a question names is on one: the
needle.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtoken.demo import questions
from vtoken.demo.questions import ANSWERS, BEGIN, COUNTS, END, IGNORED
from vtoken.demo.scenes import CLOTHES, COLOURS, MOST, SMALL_KINDS, Material, Scenes
from vtoken.ops import assign

WEIGHTS = Path(__file__).parents[2] / "examples" / "weights" / "small_video"
FRAMES = 16  # of a video
TAGGED, UNTAGGED = len(COLOURS), 2  # frames of a garment with a tag, and without
GRID, CELLS = 14, 49  # side of a frame's grid of patches, and tokens that the model gives it

VIDEO, BESIDE = "<video>", "beside"
VOCABULARY = (*questions.VOCABULARY, VIDEO, BESIDE)
IDS = {word: number for number, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Kind:
    """A kind of question.

    Args:
        question: in words; `{}` stands for what is named.
        clue: what a frame must show, in words.
        names: all that can be named.
        answers: words of the answers.
    """

    question: str
    clue: str
    names: tuple[str, ...]
    answers: tuple[str, ...]


KINDS = {
    "digit": Kind("what digit is on the {} tag ?", "{} tag", tuple(COLOURS), ANSWERS["digit"]),
    "place": Kind("where is the {} ?", "{}", CLOTHES, ANSWERS["garment place"]),
    "count": Kind("how many small {} ?", "small {}", tuple(SMALL_KINDS), COUNTS),
    "beside": Kind(f"what garment is {BESIDE} the {{}} tag ?", "{} tag", tuple(COLOURS), CLOTHES),
}  # fmt: skip
# The facts that what is named is one of, and that the answer is; of "count" it is the kind's own number.
_TOLD_BY = {"digit": ("colour", "digit"), "place": ("garment", "garment place"), "beside": ("colour", "garment")}
Facts = Mapping[str, Tensor]  # as in `Scenes`, [videos, frames]


def plan(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What the frames of random videos shall show, int64 [count, FRAMES] by name; see `Material.draw`."""

    def some(high: int, *shape: int) -> Tensor:
        """Different numbers below `high`, along the last axis."""
        return torch.rand(*shape[:-1], high, generator=generator).argsort(-1)[..., : shape[-1]]

    garments, places = some(len(CLOTHES), count, TAGGED + UNTAGGED), some(FRAMES, count, FRAMES)
    found = {
        "garment": torch.full((count, FRAMES), -1).scatter(1, places[:, : TAGGED + UNTAGGED], garments),
        "colour": torch.full((count, FRAMES), -1).scatter(1, places[:, :TAGGED], some(TAGGED, count, TAGGED)),
    }
    for number, name in enumerate(SMALL_KINDS, TAGGED + UNTAGGED):
        amounts = 1 + torch.randint(MOST, (count, 1), generator=generator)
        found[name] = torch.zeros(count, FRAMES, dtype=torch.long).scatter(1, places[:, number, None], amounts)
    return found


def film(material: Material, count: int, generator: torch.Generator) -> Scenes:
    """The frames of random videos one after the other, `count` times FRAMES."""
    wanted = {name: shown.flatten() for name, shown in plan(count, generator).items()}
    return material.draw(count * FRAMES, generator, wanted=wanted)


@dataclass(frozen=True)
class Asked:
    """One question about each of N videos.

    Args:
        kind: of `KINDS`.
        texts: the questions in words.
        clues: what the needle shows, in words.
        ids: of the questions and their answers, int64 [N, L].
        labels: what follows at each position, int64 [N, L], as in `vtoken.demo.questions.ask`; -100 everywhere if the
            video does not answer.
        needles: the frame that answers, int64 [N]; -1 if none does.
    """

    kind: str
    texts: list[str]
    clues: list[str]
    ids: Tensor
    labels: Tensor
    needles: Tensor


def shows(kind: str, facts: Facts) -> Tensor:
    """Which frames show what a question of this kind names and answer it, bool [N, frames, names]."""
    if kind == "count":
        return torch.stack([facts[name] > 0 for name in SMALL_KINDS], -1)
    key, answer = _TOLD_BY[kind]
    named = facts[key][..., None] == torch.arange(len(KINDS[kind].names))
    return named & (facts[answer] >= 0)[..., None]


def ask(kind: str, facts: Facts, which: Tensor) -> Asked:
    """A question about every video.

    Args:
        kind: of `KINDS`.
        facts: of the frames, int64 [N, frames] by name.
        which: what is named, int64 [N] into the kind's names.
    """
    asked, rows = KINDS[kind], torch.arange(len(which))
    there = shows(kind, facts)[rows, :, which]
    needles = torch.where(there.any(1), there.to(torch.uint8).argmax(1), -1)
    at = needles.clamp(min=0)
    if kind == "count":
        values = torch.stack([facts[name] for name in SMALL_KINDS], -1)[rows, at, which]
    else:
        values = facts[_TOLD_BY[kind][1]][rows, at]
    names = [asked.names[i] for i in which.tolist()]
    texts = [asked.question.format(name) for name in names]
    answers = torch.tensor([IDS[word] for word in asked.answers])[values.clamp(min=0)]
    ids = torch.cat([torch.tensor([[IDS[word] for word in text.split()] for text in texts]), answers[:, None]], 1)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -2], labels[:, -1] = answers, IDS[END]
    labels[needles < 0] = IGNORED
    return Asked(kind, texts, [asked.clue.format(name) for name in names], ids, labels, needles)


def prompt(ids: Tensor, video_tokens: int) -> Tensor:
    """Token ids [N, 1 + video_tokens + L] of prompts whose text [N, L] stands behind a video."""
    begin, video = ids.new_full((len(ids), 1), IDS[BEGIN]), ids.new_full((len(ids), video_tokens), IDS[VIDEO])
    return torch.cat([begin, video, ids], 1)


@functools.cache
def _pools() -> list[Tensor]:
    """By number of tokens t the matrix [t, 196] with which `ops.assign` makes them of a frame."""
    eye = torch.eye(GRID**2).view(GRID, GRID, -1)
    return [assign(eye, t, mode="pool").tokens for t in range(GRID**2 + 1)]


def pooled(patches: Tensor, counts: Sequence[Sequence[int]]) -> Tensor:
    """What videos hold for the language model before projection, [N, tokens, C].

    Args:
        patches: of the frames of N videos, [N, frames, 196, C].
        counts: tokens of every frame, as many in all for each video.
    """
    pools = _pools()
    videos = [
        torch.cat([pools[t] @ grid.float() for t, grid in zip(row, video, strict=True) if t])
        for row, video in zip(counts, patches, strict=True)
    ]
    return torch.stack(videos)


def load_small_video(folder: Path | None = None) -> Any:
    """The trained LLaVA-NeXT-Video in eval mode, float32, on the CPU; `examples/train_video.py` made its weights.

    Args:
        folder: what `from_pretrained` takes; None means the one in the repository.

    Raises:
        ConfigError: if there is no such folder. ImportError: if transformers is missing.
    """
    name, script = "LlavaNextVideoForConditionalGeneration", "examples/train_video.py"
    return questions.load_trained(name, folder or WEIGHTS, script)
