"""What QuoTA gains in right answers: a small trained video model, asked about videos that answer on one frame.

All rows of a budget have as many tokens in all. "uniform frames" shows evenly spaced frames whole, by the model's own
call; the others show every frame, pooled to its tokens: as many for each, or by scores. The scorer is a small CLIP,
asked for the question as it is ("question"), for the phrases that `RuleDecoupler` finds in it ("rule"), or for exactly
what the frame shows ("clue"). "true relevance" scores the frame that answers 1 and the others 0, "random scores" knows
nothing. Accuracy comes with its 95 % interval (Wilson), differences with those of paired ones; "all" is the mean over
the kinds in `LEARNED`, paired by video. Beside them: multiply-adds of tower and prefill, times of a whole call, and
both of the scorer, apart.

Towers go over every video once and questions through the language model in batches; the logits of the first videos must
equal those of plain calls of `QuotaVideoModel`, or the row is refused and the exit code is 1.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from answers import judged, paired
from options import begin, parse, parser, run, write
from torch import Tensor
from tqdm import tqdm

from vtoken import QuotaVideoModel, ops
from vtoken.accounting.prefill import Decoder, prefill_macs
from vtoken.accounting.timing import interleaved
from vtoken.accounting.vision import Tower, tower_flops
from vtoken.demo.clutter import DATA
from vtoken.demo.frame_clip import FrameCLIP, load_frame_clip, preprocess, tokenize
from vtoken.demo.questions import side_by_side
from vtoken.demo.scenes import Material
from vtoken.demo.videos import (
    CELLS,
    FRAMES,
    GRID,
    KINDS,
    Asked,
    ask,
    film,
    load_small_video,
    pooled,
    prompt,
    shows,
)
from vtoken.video import (
    CLIPScorer,
    Clue,
    IdentityDecoupler,
    PrecomputedScorer,
    RuleDecoupler,
    UniformScorer,
    sample_frame_indices,
)

LEARNED = ("digit", "place", "count")  # what "all" is the mean of: about whole videos the model can but guess "beside"
WHOLE = FRAMES * CELLS
TEXT = 9  # tokens of a prompt beside the video, of the longest question
CHUNK = 25  # videos at a time
CHECKED = 1  # videos of which the plain calls are compared, a call for every kind of question
BY_CLIP = {"QuoTA, question": IdentityDecoupler(), "QuoTA, rule": RuleDecoupler(), "QuoTA, clue": None}
NAMES = ("uniform frames", "uniform tokens", *BY_CLIP, "QuoTA, true relevance", "random scores")
OTHERS = {"over_whole": "whole video", "over_tokens": "uniform tokens", "over_frames": "uniform frames",
          "over_question": "QuoTA, question"}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A way to spend a budget."""

    name: str
    budget: int

    @property
    def shown(self) -> list[int]:
        """The frames that the model is shown."""
        return sample_frame_indices(FRAMES, self.budget // CELLS if self.name == "uniform frames" else FRAMES)


class Known:
    """A decoupler that is told what to look for."""

    def __init__(self, clue: str) -> None:
        self.clue = clue

    def decouple(self, query: str) -> Clue:
        """The clue."""
        return Clue("objects", (self.clue,), query)


class EncodedFrames(CLIPScorer):
    """The same scorer for frames that its image tower has seen before."""

    def cosines(self, frames: Any, texts: list[str]) -> Tensor:
        """Of embeddings [T, C]."""
        read = torch.nn.functional.normalize(self.model.encode_text(self.tokenizer(texts)).float(), dim=-1)
        return torch.nn.functional.normalize(frames.float(), dim=-1) @ read.T


@dataclass(frozen=True)
class Batch:
    """Some videos: pictures [N, FRAMES, 3, side, side], what is asked by kind, and what a seed made for each."""

    pictures: Tensor
    asked: dict[str, Asked]
    random: Tensor


@dataclass(frozen=True)
class Seen:
    """What towers say of a batch: patches [N, FRAMES, 196, C] the model's, embeddings [N, FRAMES, C] the scorer's."""

    patches: Tensor
    embedded: Tensor


def draw(args: argparse.Namespace, material: Material) -> tuple[list[Batch], dict[str, Tensor]]:
    """Videos with a question of every kind, and which of these count, [videos]: `args.questions` of every kind."""
    generator, batches = torch.Generator().manual_seed(args.seed), list[Batch]()
    known: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    while min(sum(int(k.sum()) for k in ks) for ks in known.values()) < args.questions:
        scenes, asked = film(material, CHUNK, generator), dict[str, Asked]()
        facts = {name: value.view(CHUNK, FRAMES) for name, value in scenes.facts.items()}
        for kind in KINDS:
            there = shows(kind, facts).any(1)
            which = (torch.rand(there.shape, generator=generator) + there).argmax(1)  # one of those that there are
            asked[kind] = ask(kind, facts, which)
            known[kind].append(asked[kind].needles >= 0)
        random = torch.rand(CHUNK, len(KINDS), FRAMES, generator=generator)
        batches.append(Batch(scenes.pictures.unflatten(0, (CHUNK, FRAMES)), asked, random))
    asking = {kind: torch.cat(ks) for kind, ks in known.items()}
    return batches, {kind: k & (k.cumsum(0) <= args.questions) for kind, k in asking.items()}


def see(model: Any, clip: FrameCLIP, batch: Batch) -> Seen:
    """Run the tower."""
    flat = batch.pictures.flatten(0, 1)
    patches = torch.cat([model.model.vision_tower(pixel_values=p).last_hidden_state[:, 1:] for p in flat.split(FRAMES)])
    shape = (len(batch.pictures), FRAMES)
    return Seen(patches.unflatten(0, shape), clip.encode_patches(patches).unflatten(0, shape))


def helpers(row: Row, batch: Batch, kind: str, n: int, clip: Any, make: Any = CLIPScorer) -> tuple[Any, Any]:
    """Scorer and decoupler of a row for the question of a kind about video n."""
    asked = batch.asked[kind]
    if row.name in BY_CLIP:
        return make(clip, tokenize, preprocess), BY_CLIP[row.name] or Known(asked.clues[n])
    if row.name == "QuoTA, true relevance":
        return PrecomputedScorer((torch.arange(FRAMES) == asked.needles[n]).float()), IdentityDecoupler()
    if row.name == "random scores":
        return PrecomputedScorer(batch.random[n, list(KINDS).index(kind)]), IdentityDecoupler()
    return UniformScorer(), IdentityDecoupler()


def plainly(model: Any, clip: Any, row: Row, batch: Batch, kind: str, n: int) -> Tensor:
    """Logits [vocabulary] behind a question, by a call as users make it."""
    asked, pictures = batch.asked[kind], batch.pictures[n]
    pixels, ids = pictures[row.shown], asked.ids[n : n + 1, :-1]
    given = {"input_ids": prompt(ids, len(pixels) * CELLS), "pixel_values_videos": pixels[None], "logits_to_keep": 1}
    if row.name in ("whole video", "uniform frames"):
        return model(**given).logits[0, -1]  # type: ignore[no-any-return]
    scorer, decoupler = helpers(row, batch, kind, n, clip)
    quota = QuotaVideoModel(model, budget=row.budget, mode="pool", scorer=scorer, decoupler=decoupler)
    frames = list(((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    out = quota(**given, frames=frames, query=asked.texts[n])
    return out.logits[0, -1]  # type: ignore[no-any-return]


def counts(row: Row, batch: Batch, seen: Seen, kind: str, clip: Any) -> tuple[list[list[int]], list[bool]]:
    """Tokens of every frame for the question about every video, and whether no frame scores more than its needle."""
    if row.name in ("whole video", "uniform frames"):
        return [[CELLS * (i in row.shown) for i in range(FRAMES)]] * len(batch.pictures), []
    found, first = list[list[int]](), list[bool]()
    for n, frames in enumerate(seen.embedded):
        scorer, decoupler = helpers(row, batch, kind, n, clip, EncodedFrames)
        scores = scorer.score(frames, decoupler.decouple(batch.asked[kind].texts[n]))
        found.append(list(ops.allocate_tokens(scores, row.budget, max_tokens=GRID**2, power=2.0)))
        first.append(int(scores.argmax()) == int(batch.asked[kind].needles[n]))
    return found, first


@torch.inference_mode()
def answer(
    model: Any, clip: FrameCLIP, row: Row, batch: Batch, seen: Seen, *, check: bool
) -> tuple[dict[str, dict[str, Tensor]], str]:
    """By kind what became of every question, [videos], and what is wrong with the row, if anything.

    "right", tokens of the needle ("tokens"), and whether it scored highest ("first"; nan where there are no scores).
    """
    plans = {kind: counts(row, batch, seen, kind, clip) for kind in KINDS}
    alike = not row.name.startswith(("QuoTA", "random"))  # whatever is asked
    logits = dict[str, Tensor]()
    for group in [list(KINDS)] if alike else [[kind] for kind in KINDS]:
        rows = model.model.multi_modal_projector(pooled(seen.patches, plans[group[0]][0]))
        parts = side_by_side(model, rows, [batch.asked[kind].ids for kind in group])
        logits |= {kind: part[:, -2] for kind, part in zip(group, parts, strict=True)}
    wrong = ""
    if check:
        some = [(kind, n) for kind in KINDS for n in range(CHECKED)]
        pairs = [(plainly(model, clip, row, batch, kind, n), logits[kind][n]) for kind, n in some]
        error = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
        wrong = f"questions in batches differ from plain calls by {error:.1e}" if error > 1e-4 else ""
    found = dict[str, dict[str, Tensor]]()
    for kind, asked in batch.asked.items():
        tokens, first = plans[kind]
        found[kind] = {
            "right": (logits[kind].argmax(-1) == asked.labels[:, -2]).double(),
            "tokens": torch.tensor(tokens).gather(1, asked.needles.clamp(min=0)[:, None])[:, 0].double(),
            "first": torch.tensor(first or [torch.nan] * len(tokens)).double(),
        }
    return found, wrong


def cost(model: Any, row: Row) -> dict[str, float]:
    """Billions of multiply-adds by docs/methods/quota.md 10: of the prefill, of it and the tower, and of the scorer."""
    patches = GRID**2 + 1
    tower, prefill = tower_flops(Tower.of(model), patches) / 2, prefill_macs(Decoder.of(model), row.budget + TEXT)
    scorer = FRAMES * tower if row.name in BY_CLIP else 0.0
    return {
        "prefill_gmacs": prefill / 1e9, "call_gmacs": (prefill + len(row.shown) * tower) / 1e9,
        "scorer_gmacs": scorer / 1e9,
    }  # fmt: skip


def figures(
    found: dict[Row, dict[str, dict[str, Tensor]]], counted: dict[str, Tensor], row: Row
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Of every kind of question, and of all, what a row answers, and by how much more than others of its budget."""
    others = {
        field: next((r for r in found if r.name == name and (r.budget == row.budget or name == "whole video")), row)
        for field, name in OTHERS.items()
    }
    others = {field: other for field, other in others.items() if other != row}
    if row.name not in BY_CLIP:
        others.pop("over_question", None)
    made = dict[str, dict[str, Any]]()
    for kind, mine in counted.items():
        own = {name: values[mine] for name, values in found[row][kind].items()}
        made[kind] = judged(own["right"], {field: found[other][kind]["right"][mine] for field, other in others.items()})
        made[kind]["needle_tokens"] = float(own["tokens"].mean())
        if not own["first"].isnan().any():
            made[kind]["needle_first"] = float(own["first"].mean())
    weight = torch.stack([counted[kind] for kind in LEARNED]).double()
    some = weight.sum(0) > 0

    def by_video(r: Row) -> Tensor:
        """The share of right answers of every video that has a question which counts."""
        right = torch.stack([found[r][kind]["right"] for kind in LEARNED])
        return ((right * weight).sum(0) / weight.sum(0).clamp(min=1))[some]

    mean = paired(by_video(row))
    made["all"] = {
        "videos": int(some.sum()), "right": mean["mean"], "low": mean["mean"] - mean["half"],
        "high": mean["mean"] + mean["half"],
    }  # fmt: skip
    made["all"] |= {field: paired(by_video(row) - by_video(other)) for field, other in others.items()}
    return made


def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for every way to spend every budget, the whole video first."""
    model = load_small_video(args.model).to(device)
    clip = load_frame_clip(model.model.vision_tower, None if args.model is None else args.model / "scorer.safetensors")
    batches, counted = draw(args, Material("test", args.data))
    rows = [Row("whole video", WHOLE), *(Row(name, WHOLE // d) for d in args.keep for name in NAMES)]
    parts: dict[Row, list[dict[str, dict[str, Tensor]]]] = {row: [] for row in rows}
    wrong = dict.fromkeys(rows, "")
    for number, batch in enumerate(tqdm(batches, unit="batch", leave=False)):
        with torch.inference_mode():
            seen = see(model, clip, batch)
        for row in rows:
            part, told = answer(model, clip, row, batch, seen, check=number == 0)
            parts[row].append(part)
            wrong[row] = wrong[row] or told
    found = {
        row: {kind: {name: torch.cat([p[kind][name] for p in ps]) for name in ps[0][kind]} for kind in KINDS}
        for row, ps in parts.items()
    }
    guess = dict[str, float]()
    for kind, mine in counted.items():
        labels = torch.cat([batch.asked[kind].labels[:, -2] for batch in batches])[mine]
        guess[kind] = float(labels.bincount().max() / len(labels))
    times = time_calls(args, model, clip, rows, batches[0], device)
    made = []
    for row in rows:
        told = {"name": row.name, "budget": row.budget, "share": row.budget / WHOLE, "frames": len(row.shown)}
        if wrong[row]:
            made.append(told | {"refused": wrong[row]})
            continue
        scoring = times["scorer"].median * 1e3 if row.name in BY_CLIP else 0.0
        time, full = times[_timed(row)], times[_timed(rows[0])]
        made.append(told | {"kinds": figures(found, counted, row), "guess": guess} | cost(model, row) | {
            "milliseconds": time.median * 1e3, "time_ratio": time.median / full.median,
            "time_ratio_minima": time.minimum / full.minimum, "scorer_milliseconds": scoring,
        })  # fmt: skip
    return made


def _timed(row: Row) -> str:
    """What is timed for a row: with scores at hand, all that show every frame cost the same."""
    return f"{row.name if row.name in ('whole video', 'uniform frames') else 'scores'} {row.budget}"


def time_calls(
    args: argparse.Namespace, model: Any, clip: FrameCLIP, rows: Sequence[Row], batch: Batch, device: torch.device
) -> dict[str, Any]:
    """Times of plain calls, and of scoring the frames of a video for one text."""
    pictures = batch.pictures[0]
    frames = list(((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    text = torch.arange(4, 4 + TEXT - 1, device=device)[None]  # whatever is asked, it costs the same
    scores = batch.random[0, 0].tolist()

    @torch.inference_mode()
    def call(row: Row) -> None:
        pixels = pictures[row.shown]
        given = {"input_ids": prompt(text, len(pixels) * CELLS), "pixel_values_videos": pixels[None]}
        if row.name in ("whole video", "uniform frames"):
            model(**given, logits_to_keep=1)
        else:
            quota = QuotaVideoModel(model, budget=row.budget, mode="pool")
            quota(**given, frame_scores=scores, logits_to_keep=1)

    scorer = CLIPScorer(clip, tokenize, preprocess)
    runs: dict[str, Callable[[], object]] = {_timed(row): functools.partial(call, row) for row in rows}
    runs["scorer"] = functools.partial(scorer.score, frames, Clue("objects", ("red tag",), ""))
    return interleaved(runs, rounds=args.rounds, device=device)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Shares of right answers in percent, a line per row."""
    kinds = [*KINDS, "all"]
    print(
        f"{'':<24}{'tokens':>7}" + "".join(f"{kind:>9}" for kind in kinds) + "   over tokens   over frames  GMACs   ms"
    )
    for row in rows:
        print(f"{row['name']:<24}{row['budget']:>7}", end="")
        if "refused" in row:
            print(f"  {row['refused']}")
            continue
        print("".join(f"{100 * row['kinds'][kind]['right']:9.1f}" for kind in kinds), end="")
        for field in ("over_tokens", "over_frames"):
            gap = row["kinds"]["all"].get(field)
            print(f"{100 * gap['mean']:+8.1f} +-{100 * gap['half']:4.1f}" if gap else " " * 14, end="")
        print(f"{row['call_gmacs'] + row['scorer_gmacs']:7.2f}{row['milliseconds'] + row['scorer_milliseconds']:6.0f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the result file; 1 if a row was refused."""
    top = parser("quota_answers", __doc__, rounds=5)
    top.add_argument("--questions", type=int, default=1000, help="of every kind")
    top.add_argument("--keep", type=int, nargs="+", choices=(2, 4, 8, 16), default=[4, 8, 16],
                     help="one token of so many")  # fmt: skip
    top.add_argument(
        "--model", type=Path, default=None, help="folder of model and scorer; None: the one in the repository"
    )
    top.add_argument("--data", type=Path, default=DATA, help="folder of the Fashion-MNIST files")
    args = parse(top, argv, {"questions": 20, "keep": [8], "rounds": 1})
    device = begin(args)
    rows = measure(args, device)
    show(rows)
    write(args, device, rows)
    return int(any("refused" in row for row in rows))


if __name__ == "__main__":
    sys.exit(run(main))
