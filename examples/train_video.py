"""Train the small video model that the repository ships, and the small CLIP that scores its frames.

    python examples/train_video.py                     # about 20 minutes of one core; out/train_video/model
    python examples/train_video.py --what scorer       # the CLIP alone, for the model that is there
    python examples/train_video.py --small             # seconds, learns nothing

The model is a LLaVA-NeXT-Video made of the small LLaVA (`examples/train_llava.py`). Its tower stays as it is, so frames
go through it once, and videos are put together of stored frames. Projector and language model learn to answer from any
number of tokens a frame: batches of whole frames, of few tokens for each, and of frames of unequal numbers, drawn
without regard to the question, as `vtoken.ops.assign` makes them. A question counts only if its frame has a token. A
killed call goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import hashlib
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

from vtoken import ops
from vtoken.accounting import compare
from vtoken.demo.clutter import DATA
from vtoken.demo.frame_clip import PAD, UNKNOWN, FrameCLIP, captions, tokenize
from vtoken.demo.questions import IMAGE, load_small_llava, side_by_side
from vtoken.demo.questions import WEIGHTS as LLAVA
from vtoken.demo.scenes import CLOTHES, COLOURS, MOST, SMALL_KINDS, Material
from vtoken.demo.videos import (
    CELLS,
    FRAMES,
    GRID,
    IDS,
    KINDS,
    VIDEO,
    VOCABULARY,
    Asked,
    ask,
    load_small_video,
    plan,
    pooled,
    shows,
)
from vtoken.errors import VTokenError

MUON_RATE, ADAMW_RATE, WARM_UP = 0.003, 0.001, 50  # steps
WHOLE = FRAMES * CELLS
BUDGETS = {WHOLE: 1, WHOLE // 2: 2, WHOLE // 4: 4, WHOLE // 8: 4, WHOLE // 16: 3}  # tokens of a video, and how often
AT_ONCE = 9000  # tokens of a batch
# Of the steps, those with so few frames with tokens, so that names are told apart before they are sought.
FEW_SHARE, FEW = 0.4, (2, 5)
ASKED = 4  # questions of every kind about a video, as far as there are so many names
UNKNOWN_SHARE = 0.15  # of the words of a caption that the scorer's text encoder does not get to see
SHARES = {"tagged": 0.55, "untagged": 0.15, "small": 0.15, "photograph": 0.15}  # of the stored frames
FEWEST = 500  # of which every video finds the frames that it is planned of


def build(llava: Any) -> Any:
    """The video model before training: tower, projector and language model of the small LLaVA, two words more."""
    text = copy.deepcopy(llava.config.text_config)
    text.vocab_size, text.max_position_embeddings = len(VOCABULARY), 2 * WHOLE
    config = LlavaNextVideoConfig(
        vision_config=llava.config.vision_config, text_config=text, image_token_index=IDS[IMAGE],
        video_token_index=IDS[VIDEO], vision_feature_layer=-1, vision_feature_select_strategy="default",
        image_seq_length=GRID**2, video_seq_length=CELLS, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaNextVideoForConditionalGeneration(config)
    state, old = model.state_dict(), llava.state_dict()
    for name, value in state.items():
        if name == "model.image_newline":
            value.zero_()
        else:
            value[: len(old[name])] = old[name]
    model.model.vision_tower.requires_grad_(False)
    return model


class Frames:
    """Stored frames: what the tower says of their patches, float16 [N, 196, C], and facts, [N] by name."""

    def __init__(self, tower: Any, material: Material, count: int, generator: torch.Generator) -> None:
        numbers = {name: round(share * count) for name, share in SHARES.items()}
        kinds = torch.cat([torch.full((n,), i) for i, n in enumerate(numbers.values())])
        count = len(kinds)

        def draw(high: int) -> Tensor:
            return torch.randint(high, (count,), generator=generator)

        wanted = {
            "garment": torch.where(kinds < 2, draw(len(CLOTHES)), -1),
            "colour": torch.where(kinds == 0, draw(len(COLOURS)), -1),
        }
        small, amount = torch.where(kinds == 2, draw(len(SMALL_KINDS)), -1), 1 + draw(MOST)
        wanted |= {name: amount * (small == i) for i, name in enumerate(SMALL_KINDS)}
        parts, facts = list[Tensor](), list[dict[str, Tensor]]()
        for rows in torch.arange(count).split(64):
            scenes = material.draw(len(rows), generator, wanted={name: value[rows] for name, value in wanted.items()})
            parts.append(patches(tower, scenes.pictures).half())
            facts.append(scenes.facts)
        self.patches = torch.cat(parts)
        self.facts = {name: torch.cat([part[name] for part in facts]) for name in facts[0]}
        self.bearing = torch.stack([self.facts["garment"] + 1, *(self.facts[name] for name in SMALL_KINDS)]).sum(0) > 0
        self._like = dict[tuple[int, ...], list[int]]()
        for number, key in enumerate(_keys(wanted)):
            self._like.setdefault(key, []).append(number)

    def videos(self, count: int, generator: torch.Generator) -> Tensor:
        """Numbers of the frames of random videos, [count, FRAMES]."""
        wanted = plan(count, generator)
        luck = torch.rand(count * FRAMES, generator=generator).tolist()
        keys = _keys({name: value.flatten() for name, value in wanted.items()})
        like = [self._like[key] for key in keys]
        return torch.tensor([own[int(u * len(own))] for own, u in zip(like, luck, strict=True)]).view(count, FRAMES)


def _keys(wanted: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """What a frame shows, but for how many small garments."""
    small = [wanted[name] > 0 for name in SMALL_KINDS]
    return [tuple(row) for row in torch.stack([wanted["garment"], wanted["colour"], *small], 1).tolist()]


@torch.inference_mode()
def patches(tower: Any, pictures: Tensor) -> Tensor:
    """What the tower says of every patch, [N, 196, C]."""
    found: Tensor = tower(pixel_values=pictures).last_hidden_state[:, 1:]
    return found.clone()


def spread(budget: int, rng: random.Random, few: Sequence[int] = ()) -> list[int]:
    """Tokens of the frames of one video: evenly, on whole frames, or by chance; or on some of a few frames alone."""
    way = rng.random()
    if few:
        chosen = rng.sample(few, rng.randint(*FEW))
        scores = [float(i in chosen) for i in range(FRAMES)]
    elif way < 0.25:
        scores = [1.0] * FRAMES
    elif way < 0.45:
        chosen = rng.sample(range(FRAMES), budget // CELLS)
        return [CELLS * (i in chosen) for i in range(FRAMES)]
    elif way < 0.8:
        power = rng.choice((1, 2, 4, 8))
        scores = [rng.random() ** power for _ in range(FRAMES)]
    else:  # one to three frames and, perhaps, a little of the others
        chosen, rest = rng.sample(range(FRAMES), rng.randint(1, 3)), rng.choice((0.0, 0.0, 0.01, 0.03))
        scores = [1.0 if i in chosen else rest for i in range(FRAMES)]
    return list(ops.allocate_tokens(torch.tensor(scores), budget, max_tokens=GRID**2, power=1.0))


def questions(facts: dict[str, Tensor], seen: Tensor, generator: torch.Generator) -> list[Asked]:
    """`ASKED` questions of every kind about every video, about frames with a token as far as there are any."""
    found = []
    for kind in KINDS:
        there = shows(kind, facts)
        order = torch.rand(there[:, 0].shape, generator=generator)
        order = order + there.any(1) + (there & seen[..., None]).any(1)
        for which in order.topk(min(ASKED, len(KINDS[kind].names))).indices.unbind(1):
            asked = ask(kind, facts, which)
            blind = ~seen.gather(1, asked.needles.clamp(min=0)[:, None])[:, 0]
            asked.labels[blind] = -100
            found.append(asked)
    return found


def losses(
    model: Any, frames: Frames, picked: Tensor, counts: Sequence[Sequence[int]], generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch of videos, and shares of right answers by kind."""
    facts = {name: value[picked] for name, value in frames.facts.items()}
    asked = questions(facts, torch.tensor(counts) > 0, generator)
    rows = pooled(frames.patches[picked], counts)
    with torch.autocast("cpu", torch.bfloat16):
        parts = side_by_side(model, model.model.multi_modal_projector(rows), [one.ids for one in asked])
    logits, labels = torch.cat(parts, 1).float(), torch.cat([one.labels for one in asked], 1)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    right = dict[str, float]()
    for kind in KINDS:
        mine = [(part[:, -2], one.labels[:, -2]) for part, one in zip(parts, asked, strict=True) if one.kind == kind]
        found, label = (torch.cat(each) for each in zip(*mine, strict=True))
        found = found.argmax(-1)
        if (label >= 0).any():
            right[kind] = float((found == label)[label >= 0].float().mean())
    return loss, right


@torch.inference_mode()
def accuracy(model: Any, frames: Frames, count: int, budget: int, seed: int = 12345) -> dict[str, float]:
    """Shares of right answers about held-back videos whose frames have equal numbers of tokens."""
    generator, found = torch.Generator().manual_seed(seed), dict[str, list[float]]()
    counts = [ops.allocate_tokens(torch.ones(FRAMES), budget, max_tokens=GRID**2)] * 10
    model.eval()
    for _ in range(max(1, count // 10)):
        for name, share in losses(model, frames, frames.videos(10, generator), counts, generator)[1].items():
            found.setdefault(name, []).append(share)
    model.train()
    return {name: sum(shares) / len(shares) for name, shares in found.items()}


def optimisers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the language model, AdamW for everything else that learns."""
    matrices = [p for p in model.model.language_model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    parts = (model.model.multi_modal_projector, model.model.language_model, model.lm_head)
    rest = [p for part in parts for p in part.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=ADAMW_RATE, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def train(args: argparse.Namespace, frames: Frames, test: Frames, llava: Any, checkpoint: Path) -> tuple[Any, float]:
    """A model that saw `args.steps` batches, from the last checkpoint on if there is one; CPU seconds of all calls."""
    torch.manual_seed(args.seed)
    generator, rng = torch.Generator().manual_seed(args.seed + 1), random.Random(args.seed)
    model = build(llava).train()
    model.set_attn_implementation("eager")  # the backward pass of the fused one is slow on the CPU
    opts = optimisers(model)
    rates = [opt.param_groups[0]["lr"] for opt in opts]
    first, spent = 0, 0.0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["optimisers"], strict=True):
            opt.load_state_dict(state)
        generator.set_state(saved["generator"])
        rng.setstate(saved["random"])
        first, spent = saved["step"], saved["cpu_seconds"]
    start, began, mean = time.time(), time.process_time(), dict[str, float]()
    for step in range(first, args.steps):
        scale = min((step + 1) / WARM_UP, 2 * (args.steps - step) / args.steps, 1.0)
        for opt, rate in zip(opts, rates, strict=True):
            opt.param_groups[0]["lr"] = rate * scale
        early = step < FEW_SHARE * args.steps
        budget = WHOLE // 4 if early else rng.choices(list(BUDGETS), list(BUDGETS.values()))[0]
        count = max(1, min(args.batch, AT_ONCE // (budget + 60)))
        picked = frames.videos(count, generator)
        few = [row.nonzero()[:, 0].tolist() if early else [] for row in frames.bearing[picked]]
        loss, right = losses(model, frames, picked, [spread(budget, rng, own) for own in few], generator)
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        for name, value in {"loss": float(loss.detach()), **right}.items():
            mean[name] = mean.get(name, value) + 0.05 * (value - mean.get(name, value))
        last = step + 1 == args.steps
        if step % 25 == 24 or last:
            told = ", ".join(f"{name} {value:.2f}" for name, value in mean.items())
            print(f"{step + 1}/{args.steps} {time.time() - start:.0f} s {told}", flush=True)
        if (step + 1) % args.save_every == 0 or last:
            partial = checkpoint.with_suffix(".partial")
            torch.save({
                "model": model.state_dict(), "step": step + 1, "cpu_seconds": spent + time.process_time() - began,
                "optimisers": [opt.state_dict() for opt in opts], "generator": generator.get_state(),
                "random": rng.getstate(),
            }, partial)  # fmt: skip
            partial.replace(checkpoint)
            for budget in (WHOLE // 2, WHOLE // 8):
                found = accuracy(model, test, min(args.test, 60), budget)
                told = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
                print(f"  held back, {budget} tokens: {told}", flush=True)
    return model, spent + time.process_time() - began


def train_scorer(args: argparse.Namespace, tower: Any, frames: Frames) -> FrameCLIP:
    """A CLIP that tells which captions are true of a frame: a sigmoid for every pair of a batch."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed + 2)
    texts, true = captions(frames.facts)
    tokens, clip = tokenize(texts), FrameCLIP(tower).train()
    learning = [p for p in clip.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(learning, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    mean, start = 0.0, time.time()
    for step in range(args.scorer_steps):
        opt.param_groups[0]["lr"] = 1e-3 * min(
            (step + 1) / WARM_UP, 2 * (args.scorer_steps - step) / args.scorer_steps, 1
        )
        picked = torch.randint(len(frames.patches), (args.scorer_batch,), generator=generator)
        hidden = (torch.rand(tokens.shape, generator=generator) < UNKNOWN_SHARE) & (tokens != PAD)
        with torch.autocast("cpu", torch.bfloat16):
            seen = clip.encode_patches(frames.patches[picked].float())
            read = clip.encode_text(torch.where(hidden, UNKNOWN, tokens))
        cosines = F.normalize(seen.float(), dim=-1) @ F.normalize(read.float(), dim=-1).T
        logits = cosines * clip.logit_scale.exp() + clip.logit_bias
        loss = F.binary_cross_entropy_with_logits(logits, true[picked].float(), reduction="sum") / len(picked)
        loss.backward()
        opt.step()
        opt.zero_grad()
        mean += (float(loss.detach()) - mean) * max(0.05, 1 / (step + 1))
        if step % 50 == 49:
            print(f"scorer {step + 1}/{args.scorer_steps} {time.time() - start:.0f} s loss {mean:.3f}", flush=True)
    return clip.eval()


@torch.inference_mode()
def retrieval(clip: FrameCLIP, frames: Frames, count: int, seed: int = 12345) -> dict[str, dict[str, float]]:
    """How often the frame that answers scores highest of its video, by kind, for the clue and for the question."""
    generator, found = torch.Generator().manual_seed(seed), dict[str, dict[str, float]]()
    picked = frames.videos(count, generator)
    facts = {name: value[picked] for name, value in frames.facts.items()}
    seen = torch.cat([clip.encode_patches(p.float()) for p in frames.patches[picked.flatten()].split(200)])
    seen = F.normalize(seen, dim=-1).view(count, FRAMES, -1)
    for kind in KINDS:
        there = shows(kind, facts).any(1)
        which = (torch.rand(there.shape, generator=generator) + there).argmax(1)
        asked = ask(kind, facts, which)
        known, found[kind] = asked.needles >= 0, {}
        for name, texts in (("clue", asked.clues), ("question", asked.texts)):
            read = F.normalize(clip.encode_text(tokenize(texts)), dim=-1)
            best = (seen @ read[..., None])[..., 0].argmax(1)
            found[kind][name] = float((best == asked.needles)[known].float().mean())
    return found


def digest(folder: Path) -> str:
    """What tells the weights in a folder from others."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure on test videos, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("all", "model", "scorer"), default="all")
    parser.add_argument("--steps", type=int, default=1500, help="batches of videos")
    parser.add_argument("--batch", type=int, default=32, help="videos at most")
    parser.add_argument("--scorer-steps", type=int, default=1200, help="batches of frames")
    parser.add_argument("--scorer-batch", type=int, default=128, help="frames")
    parser.add_argument("--frames", type=int, default=8000, help="training frames that are stored")
    parser.add_argument("--llava", type=Path, default=None, help="folder of the small LLaVA; the one in the repository")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the Fashion-MNIST files")
    parser.add_argument("--out", type=Path, default=Path("out/train_video"), help="folder of model and checkpoint")
    parser.add_argument("--save-every", type=int, default=300, help="steps between checkpoints")
    parser.add_argument("--test", type=int, default=500, help="test videos in the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "--small" in arguments:
        parser.set_defaults(steps=3, batch=2, scorer_steps=2, scorer_batch=4, frames=FEWEST, test=10)
    args = parser.parse_args(arguments)
    if args.frames < FEWEST:
        parser.error(f"--frames {args.frames}: at least {FEWEST}, or a video may lack one")
    torch.set_num_threads(args.threads)
    folder = args.out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        llava = load_small_llava(args.llava)
        generator = torch.Generator().manual_seed(args.seed)
        tower = llava.model.vision_tower if args.what != "scorer" else load_small_video(folder).model.vision_tower
        frames = Frames(tower, Material("train", args.data), args.frames, generator)
        test = Frames(tower, Material("test", args.data), max(FEWEST, args.frames // 8), generator)
    except (VTokenError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    about = json.loads((folder / "training.json").read_text()) if args.what == "scorer" else {}
    shared = {
        "command": compare.command("examples/train_video.py", arguments),
        "date": datetime.date.today().isoformat(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    if args.what != "scorer":
        model, seconds = train(args, frames, test, llava, args.out / "checkpoint.pt")
        right = {str(budget): accuracy(model, test, args.test, budget) for budget in BUDGETS}
        about["model"] = shared | {
            "right, evenly spread, by tokens": right, "test": f"{args.test} videos of the test split",
            "cpu_minutes": round(seconds / 60, 1), "sha256 of the small LLaVA": digest(args.llava or LLAVA),
        }  # fmt: skip
        model = copy.deepcopy(model).eval().half()
        model.set_attn_implementation("sdpa")
        model.save_pretrained(folder)
    if args.what != "model":
        began = time.process_time()
        clip = train_scorer(args, tower, frames)
        seconds = time.process_time() - began
        save_file({name: value.half() for name, value in clip.own_state().items()}, folder / "scorer.safetensors")
        about["scorer"] = shared | {
            "needle scores highest": retrieval(clip, test, args.test), "cpu_minutes": round(seconds / 60, 1)
        }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
