"""What fewer image tokens cost in right answers: a small trained LLaVA, asked about pictures whose contents are known.

Every setting answers the same questions. Accuracy comes with its 95 % interval (Wilson), the loss against the whole
image and the gain over a uniform grid of as many tokens with those of paired differences. Beside them: multiply-adds of
the prefill and of the whole call (tower, projector, prefill), and time of the whole call against the whole image's.

Conversations about a picture go through the language model side by side, which is quicker; the logits of the first
pictures must equal those of plain calls, one question each, or the setting is refused and the exit code is 1. CDPruner,
which looks at the question, is called plainly throughout. Random tokens are drawn anew for every 50 pictures.

Prompt methods number what they keep in two ways (`positions`): "compact", one after the other, or "original", each
token by its place in the whole image. Merged and smaller images have the first alone. A uniform grid is compared with
what is numbered alike.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from options import begin, parse, parser, run, write
from quality import wilson
from torch import Tensor
from tqdm import tqdm

import vtoken
from vtoken.accounting.prefill import Decoder, prefill_macs
from vtoken.accounting.timing import Timing, interleaved
from vtoken.core.config import MethodConfig
from vtoken.demo.clutter import DATA, PATCH, SIDE
from vtoken.demo.questions import KINDS, WEIGHTS, ask, load_small_llava, prompt, side_by_side
from vtoken.demo.scenes import SMALL_KINDS, Material, Scenes

WHOLE = (SIDE // PATCH) ** 2
TEXT = 7  # tokens of a prompt beside the image, as most questions have
CHUNK = 50  # pictures at a time
CHECKED = 4  # pictures of which the plain calls are compared
SMALLER = {98: 80, 49: 56, 22: 40, 12: 32}  # tokens -> side of the picture with at least as many
PROMPT_METHODS = {
    "VTC-CLS": vtoken.VTCCLS, "DivPrune": vtoken.DivPrune, "VisionZip": vtoken.VisionZip,
    "CDPruner": vtoken.CDPruner, "random": vtoken.RandomTokens, "uniform grid": vtoken.UniformTokens,
    "pooling": vtoken.PooledTokens,
}  # fmt: skip
NUMBERINGS = ("compact", "original")
TOWER_METHODS = {"PiToMe": vtoken.PiToMe, "ToMe": vtoken.ToMe}
Batch = tuple[Scenes, list[tuple[Tensor, Tensor]]]  # and what is asked about them, by kind


@dataclass(frozen=True)
class Setting:
    """A way to fewer tokens.

    Args:
        name: of it.
        budget: tokens that it is for.
        configs: to apply; nothing where the pictures are smaller.
        side: of the pictures.
        positions: how the language model numbers what is left.
    """

    name: str
    budget: int
    configs: tuple[MethodConfig, ...] = ()
    side: int = SIDE
    positions: str = "compact"

    @property
    def tokens(self) -> int:
        """Image tokens that reach the language model."""
        return self.budget if self.side == SIDE else (self.side // PATCH) ** 2

    @property
    def together(self) -> bool:
        """Whether the rows of an image do not depend on what is asked about it."""
        return not any(isinstance(config, vtoken.CDPruner) for config in self.configs)

    def placeholders(self, model: Any) -> int:
        """What a prompt has to hold for the image: the tokens that leave the tower."""
        tower = [config for config in self.configs if config.part == "tower"]
        return vtoken.num_tokens(model, tower) if tower else (self.side // PATCH) ** 2

    def seeded(self, seed: int) -> list[MethodConfig]:
        """The settings, with another draw where they draw."""
        return [c.replace(seed=seed) if isinstance(c, vtoken.RandomTokens) else c for c in self.configs]


def schedule(tokens: int, depth: int) -> tuple[int, ...]:
    """Patches to merge in every block, the same share each time, so that `tokens` are left."""
    left = [round(WHOLE * (tokens / WHOLE) ** (i / depth)) for i in range(depth + 1)]
    return tuple(before - after for before, after in itertools.pairwise(left))


def settings(
    model: Any, divisors: Sequence[int], names: Sequence[str], numberings: Sequence[str] = NUMBERINGS
) -> list[Setting]:
    """The whole image, then for every count all methods."""
    depth, found = model.config.vision_config.num_hidden_layers, [Setting("whole image", WHOLE)]
    for tokens in (round(WHOLE / divisor) for divisor in divisors):
        options = [
            Setting(name, tokens, (make(num_tokens=tokens, positions=positions),), positions=positions)
            for name, make in PROMPT_METHODS.items()
            for positions in numberings
        ]
        options += [
            Setting(name, tokens, (make(r=schedule(tokens, depth)),)) for name, make in TOWER_METHODS.items()
        ]  # fmt: skip
        # Half of what goes, as a factor, in the tower, the rest behind it.
        merged = vtoken.PiToMe(r=schedule(round(math.sqrt(WHOLE * tokens)), depth))
        both = (merged, vtoken.VTCCLS(num_tokens=tokens, positions="compact"))
        options.append(Setting("PiToMe, then VTC-CLS", tokens, both))
        options.append(Setting("lower resolution", tokens, side=SMALLER[tokens]))
        found += [option for option in options if option.name in names]
    return found


def smaller(model: Any, side: int) -> Any:
    """The same model for pictures of fewer pixels, its table of positions resampled."""
    import transformers

    config = type(model.config).from_dict(model.config.to_dict())
    config.vision_config.image_size = side
    state, name = dict(model.state_dict()), "model.vision_tower.embeddings.position_embedding.weight"
    first, table = state[name].split([1, WHOLE])
    grid = table.T.unflatten(1, (SIDE // PATCH, -1))[None]
    small = F.interpolate(grid, (side // PATCH, side // PATCH), mode="bicubic", antialias=True)
    state[name] = torch.cat([first, small[0].flatten(1).T])
    other = transformers.LlavaForConditionalGeneration(config)
    other.load_state_dict(state)
    return other.to(model.device).eval()


def resized(pictures: Tensor, side: int) -> Tensor:
    """Pictures [N, 3, side, side]."""
    if side == pictures.shape[-1]:
        return pictures
    return F.interpolate(pictures, (side, side), mode="bilinear", antialias=True)


def plainly(model: Any, pictures: Tensor, ids: Tensor, placeholders: int) -> Tensor:
    """Logits [N, vocabulary] behind the last question mark, by a call as users make it."""
    out = model(input_ids=prompt(ids[:, :-1], placeholders), pixel_values=pictures, logits_to_keep=1)
    logits: Tensor = out.logits[:, -1]
    return logits


def together(
    model: Any, setting: Setting, pictures: Tensor, texts: Sequence[Tensor], placeholders: int
) -> list[Tensor]:  # fmt: skip
    """The same logits for several questions about the same pictures; tower and image go through once."""
    if any(config.part == "prompt" for config in setting.configs):
        given = {"input_ids": prompt(texts[0][:, :-1], placeholders), "pixel_values": pictures}
        images = vtoken.encode_images(model, given)
        rows = torch.stack([image.rows for image in images])
        kept = torch.stack([image.kept for image in images])
    else:
        rows = torch.stack(list(model.model.get_image_features(pixel_values=pictures).pooler_output))
    numbered = (kept, placeholders) if setting.positions == "original" else ()
    return [part[:, -2] for part in side_by_side(model, rows, texts, *numbered)]


def draw(args: argparse.Namespace, material: Material) -> tuple[list[Batch], dict[str, Tensor]]:
    """Pictures with what is asked about them, and which of the questions of every kind count, [pictures].

    There are as many pictures as it takes for `args.questions` questions of every kind that have an answer.
    """
    generator, batches = torch.Generator().manual_seed(args.seed), list[Batch]()
    known: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    while min(sum(int(k.sum()) for k in ks) for ks in known.values()) < args.questions:
        scenes, asked = material.draw(CHUNK, generator), []
        for kind in KINDS:
            which = torch.randint(len(SMALL_KINDS), (CHUNK,), generator=generator) if kind == "count" else None
            asked.append(ask(kind, scenes, which))
            known[kind].append(asked[-1][1][:, -2] >= 0)
        batches.append((scenes, asked))
    asking = {kind: torch.cat(ks) for kind, ks in known.items()}
    return batches, {kind: k & (k.cumsum(0) <= args.questions) for kind, k in asking.items()}


@torch.inference_mode()
def answer(
    model: Any, setting: Setting, batches: Sequence[Batch], tick: Callable[[], object]
) -> tuple[dict[str, Tensor], str]:
    """Which questions are answered rightly, [pictures] by kind, and what is wrong with the setting, if anything."""
    right: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    placeholders = setting.placeholders(model)
    for number, (scenes, asked) in enumerate(batches):
        pictures = resized(scenes.pictures, setting.side).to(model.device)
        texts = [ids.to(model.device) for ids, _ in asked]
        with applied(model, setting.seeded(number)):
            if setting.together:
                found = together(model, setting, pictures, texts, placeholders)
            if number == 0 or not setting.together:
                some = CHECKED if setting.together else len(pictures)
                plain = [plainly(model, pictures[:some], ids[:some], placeholders) for ids in texts]
                if not setting.together:
                    found = plain
                pairs = [(a, b[:some]) for a, b in zip(plain, found, strict=True)]
                error = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
                if error > 1e-4:
                    return {}, f"questions side by side differ from plain calls by {error:.1e}"
        for kind, logits, (_, labels) in zip(KINDS, found, asked, strict=True):
            right[kind].append((logits.argmax(-1).cpu() == labels[:, -2]).double())
        tick()
    return {kind: torch.cat(parts) for kind, parts in right.items()}, ""


def applied(model: Any, configs: Sequence[MethodConfig]) -> contextlib.AbstractContextManager[Any]:
    """`vtoken.applied`, or nothing where there is nothing to apply."""
    return vtoken.applied(model, list(configs)) if configs else contextlib.nullcontext(model)


def paired(difference: Tensor) -> dict[str, float]:
    """Mean of differences and half its 95 % interval."""
    return {
        "mean": float(difference.mean()),
        "half": 1.96 * float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan,
    }


def judged(right: Tensor, others: dict[str, Tensor]) -> dict[str, Any]:
    """Figures of the answers to the questions of a kind, 1 or 0, [questions], and of the differences from others."""
    low, high = wilson(int(right.sum()), len(right))
    found = {"questions": len(right), "right": float(right.mean()), "low": low, "high": high}
    return found | {name: paired(right - other) for name, other in others.items()}


def cost(model: Any, setting: Setting, text: int) -> dict[str, float]:
    """Multiply-adds of a prompt, by the formulas of `vtoken.prompt_report`."""
    prefill = prefill_macs(Decoder.of(model), setting.tokens + text)
    behind = [c for c in setting.configs if c.part == "prompt"]
    # A count that removes nothing where nothing is removed behind the tower.
    configs = setting.configs if behind else (*setting.configs, vtoken.UniformTokens(keep_ratio=1.0))
    whole = vtoken.prompt_report(model, configs, text_tokens=text).after
    assert whole.prefill_macs == prefill, (setting, whole, prefill)
    return {"prefill_gmacs": prefill / 1e9, "call_gmacs": whole.macs / 1e9}


def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row per setting, the whole image first."""
    model, material = load_small_llava(args.model).to(device), Material("test", args.data)
    batches, counted = draw(args, material)
    chosen = settings(model, args.keep, args.method, args.positions)
    models = {side: model if side == SIDE else smaller(model, side) for side in {s.side for s in chosen}}
    found, wrong = dict[Setting, dict[str, Tensor]](), dict[Setting, str]()
    with tqdm(total=len(chosen) * len(batches), unit="batch", leave=False) as bar:
        for setting in chosen:
            found[setting], wrong[setting] = answer(models[setting.side], setting, batches, bar.update)
    times = time_calls(args, models, chosen, batches[0][0].pictures[: args.batch], device)
    rows, whole = [], found[chosen[0]]
    labels = {kind: torch.cat([asked[i][1][:, -2] for _, asked in batches]) for i, kind in enumerate(KINDS)}
    guess = {kind: float(labels[kind][counted[kind]].bincount().max() / counted[kind].sum()) for kind in KINDS}
    for setting in chosen:
        row = {"name": setting.name, "budget": setting.budget, "tokens": setting.tokens, "side": setting.side,
               "positions": setting.positions, "method": [config.to_dict() for config in setting.configs]}  # fmt: skip
        if wrong[setting]:
            rows.append(row | {"refused": wrong[setting]})
            continue
        others = {"over_whole": whole}
        if setting.name != "uniform grid":
            alike = (setting.budget, setting.positions)
            grids = (found[s] for s in chosen if s.name == "uniform grid" and (s.budget, s.positions) == alike)
            others["over_uniform"] = next(grids, {})
        kinds = {
            kind: judged(found[setting][kind][mine], {name: o[kind][mine] for name, o in others.items() if o})
            for kind, mine in counted.items()
        }
        row |= {"kinds": kinds, "guess": guess} | cost(models[setting.side], setting, TEXT)
        time, full = times[setting], times[chosen[0]]
        rows.append(row | {
            "milliseconds": time.median * 1e3, "time_ratio": time.median / full.median,
            "time_ratio_minima": time.minimum / full.minimum,
        })  # fmt: skip
    return rows


def time_calls(
    args: argparse.Namespace, models: dict[int, Any], chosen: Sequence[Setting], pictures: Tensor, device: torch.device
) -> dict[Setting, Timing]:
    """Time of a plain call of every setting: tower, projector, method and language model."""
    ids = torch.arange(4, 4 + TEXT, device=device).expand(len(pictures), -1)  # whatever is asked, it costs the same

    @torch.inference_mode()
    def call(setting: Setting, pixels: Tensor, placeholders: int) -> None:
        with applied(models[setting.side], setting.configs):
            plainly(models[setting.side], pixels, ids, placeholders)

    runs: dict[str, Callable[[], object]] = {}
    for number, setting in enumerate(chosen):
        pixels = resized(pictures, setting.side).to(device)
        runs[str(number)] = functools.partial(call, setting, pixels, setting.placeholders(models[setting.side]))
    times = interleaved(runs, rounds=args.rounds, device=device)
    return {setting: times[str(number)] for number, setting in enumerate(chosen)}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Shares of right answers in percent, a line per setting."""
    print(
        f"{'':<24}{'tokens':>7}{'positions':>10}"
        + "".join(f"{kind[:12]:>13}" for kind in KINDS)
        + f"{'GMACs':>8}{'time x':>8}"
    )
    for row in rows:
        print(f"{row['name']:<24}{row['tokens']:>7}{row['positions']:>10}", end="")
        if "refused" in row:
            print(f"  {row['refused']}")
            continue
        cells = [f"{100 * row['kinds'][kind]['right']:13.1f}" for kind in KINDS]
        print("".join(cells) + f"{row['call_gmacs']:8.3f}{row['time_ratio']:8.2f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the result file; 1 if a setting was refused."""
    top = parser("answers", __doc__, rounds=5)
    names = [*PROMPT_METHODS, *TOWER_METHODS, "PiToMe, then VTC-CLS", "lower resolution"]
    top.add_argument("--questions", type=int, default=1000, help="of every kind")
    top.add_argument("--keep", type=int, nargs="+", choices=(2, 4, 9, 16), default=[2, 4, 9, 16],
                     help="keep one image token of so many")  # fmt: skip
    top.add_argument("--method", nargs="+", choices=names, default=names)
    top.add_argument("--positions", nargs="+", choices=NUMBERINGS, default=list(NUMBERINGS),
                     help="how prompt methods number what they keep")  # fmt: skip
    top.add_argument("--batch", type=int, default=8, help="prompts of a timed call")
    top.add_argument("--model", type=Path, default=WEIGHTS, help="folder of the LLaVA")
    top.add_argument("--data", type=Path, default=DATA, help="folder of the Fashion-MNIST files")
    args = parse(top, argv, {"questions": 60, "keep": [4], "rounds": 1, "batch": 2})
    device = begin(args)
    try:
        rows = measure(args, device)
    except ImportError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    show(rows)
    write(args, device, rows)
    return int(any("refused" in row for row in rows))


if __name__ == "__main__":
    sys.exit(run(main))
