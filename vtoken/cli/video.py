"""`python -m vtoken video`: score the frames of a clip for a question, spread a token budget, draw both."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from vtoken.errors import ConfigError
from vtoken.ops import allocate_tokens, row_widths
from vtoken.video import (
    CLIPScorer,
    Clue,
    IdentityDecoupler,
    PrecomputedScorer,
    RuleDecoupler,
    Scorer,
    UniformScorer,
    VideoInfo,
    frame_times,
    num_frames,
    read_frames,
    sample_frame_indices,
    score_frames,
    scoring_flops,
    video_info,
)

_SIDE = 448  # pixels of the longer side at which frames are read; scorers and thumbnails see less
_SHOWN = 12  # frames in the table
_SCORERS = (
    "name a scorer, as this command does not invent scores: --model ViT-B-32 --pretrained TAG_OR_FILE (open_clip; a "
    "tag needs a hub, a file does not), --model local-dir:FOLDER (an open_clip model and its weights), --scores FILE "
    "(JSON, or one number a line) or --uniform (the budget is spread evenly)"
)


def run(args: argparse.Namespace) -> int:
    """Read, score, allocate, print, draw."""
    scorer, source = _scorer(args)
    info = video_info(args.file)
    wanted = args.frames if args.frames is not None else num_frames(info.duration, max_fps=args.max_fps)
    indices = sample_frame_indices(info.frames, wanted)
    budget = _budget(args.budget, len(indices), args.default_tokens)
    frames = read_frames(args.file, indices, max_side=_SIDE)
    clue = (RuleDecoupler() if args.decoupler == "rule" else IdentityDecoupler()).decouple(args.question)
    scores = score_frames(scorer, list(frames), clue).tolist()
    height, width = args.grid
    most = height * width if args.max_tokens is None else min(args.max_tokens, height * width)
    tokens = allocate_tokens(scores, budget, min_tokens=args.min_tokens, max_tokens=most, power=args.power)
    times = frame_times(indices, info.fps)
    found = {
        "file": str(args.file),
        "question": args.question,
        "clue": {"kind": clue.kind, "items": list(clue.items)},
        "scorer": source,
        "budget_requested": budget,
        "budget_effective": sum(tokens),
        "default_tokens": len(indices) * args.default_tokens,
        "frames": indices,
        "times": times,
        "scores": scores,
        "tokens": tokens,
        "scorer_flops": scoring_flops(scorer, list(frames), clue),
        "rows": [len(row_widths(t, height, width)) for t in tokens],
    }
    if args.out is not None:
        from vtoken.visualize import plot_frames

        title = f"{args.question}\n{sum(tokens)} tokens over {len(tokens)} frames of {args.file.name}; scores: {source}"
        plot_frames(frames, scores, tokens, args.out, times=times, grid=(height, width), title=title)
    print(json.dumps(found) if args.json else _table(found, info, clue))
    if args.out is not None and not args.json:
        print(f"wrote {args.out}")
    return 0


def _table(found: dict[str, Any], info: VideoInfo, clue: Clue) -> str:
    """What was found, in lines."""
    tokens, scores, times = found["tokens"], found["scores"], found["times"]
    sought = ", ".join(clue.items) if clue.items else "the question as it is"
    lines = [
        f"{found['file']}: {info.frames} frames, {info.duration:.1f} s, {info.width} x {info.height}; "
        f"{len(tokens)} sampled",
        f"looked for ({clue.kind}): {sought}",
        f"scores: {found['scorer']}",
        f"budget {found['budget_requested']}: {found['budget_effective']} tokens spent, {found['default_tokens']} "
        f"without a budget; {sum(t > 0 for t in tokens)} frames kept, {min(tokens)} to {max(tokens)} tokens each",
        f"{'seconds':>8} {'score':>7} {'tokens':>7}",
    ]
    best = sorted(sorted(range(len(tokens)), key=lambda i: -tokens[i])[:_SHOWN])
    lines += [f"{times[i]:>8.2f} {scores[i]:>7.3f} {tokens[i]:>7}" for i in best]
    if len(best) < len(tokens):
        lines.append(f"(the {len(best)} frames with the most tokens; --json has all)")
    return "\n".join(lines)


def _budget(text: str, frames: int, default_tokens: int) -> int:
    """Tokens: a whole number as it is, a fraction of what the unmodified model spends on these frames."""
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"--budget {text}: a number of tokens, or a share in (0, 1] such as 0.5") from None
    if text.strip().lstrip("+").isdecimal():
        return int(text)
    if not 0 < value <= 1:
        raise ConfigError(f"--budget {text}: a share lies in (0, 1]; write tokens as a whole number")
    return max(1, math.floor(value * frames * default_tokens + 0.5))


def _scorer(args: argparse.Namespace) -> tuple[Scorer, str]:
    """The scorer that the options name, and how to call it."""
    named = [name for name in ("model", "scores", "uniform") if getattr(args, name)]
    if len(named) != 1:
        raise ConfigError(_SCORERS if not named else f"choose one of {', '.join('--' + name for name in named)}")
    if args.uniform:
        return UniformScorer(), "none, the budget is spread evenly"
    if args.scores is not None:
        return PrecomputedScorer(_read_scores(args.scores)), f"given in {args.scores.name}"
    return _clip(args), f"cosines of open_clip {args.model}" + (f", {args.pretrained}" if args.pretrained else "")


def _read_scores(path: Path) -> list[float]:
    """Numbers from a JSON list, a file that this command wrote with --json, or lines."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--scores {path} cannot be read: {error}") from error
    try:
        found = json.loads(text)
        found = found["scores"] if isinstance(found, dict) else found
        return [float(value) for value in (found if isinstance(found, list) else [found])]
    except (ValueError, KeyError, TypeError):
        pass
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"--scores {path}: expected a JSON list of numbers, or numbers line by line") from None


def _clip(args: argparse.Namespace) -> CLIPScorer:
    """An open_clip model with weights; random weights are refused, as their scores mean nothing."""
    import open_clip

    own = ":" in args.model  # local-dir: and hf-hub: bring their weights
    if own == bool(args.pretrained):
        raise ConfigError(
            f"--model {args.model} brings its own weights; leave --pretrained out"
            if own
            else f"--model {args.model} needs --pretrained, a tag or a file: random weights would score at random"
        )
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            args.model, pretrained=args.pretrained, require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(args.model)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--model {args.model} cannot be loaded: {error}") from error
    return CLIPScorer(model.eval(), tokenizer, preprocess, reduce=args.reduce, scale=args.scale)
