"""What the saved work costs in quality, on real images, with random controls and plain down-sampling beside it.

dense: a pretrained ViT (saliency) on photographs. Correlation and mean absolute difference of the map with the
    unpatched model's, and the cosine of the class tokens; mean +- standard deviation over photographs.
clutter: top-1 of a small ViT on cluttered Fashion-MNIST. Every seed draws other test canvases and another plan of the
    random controls. top-1: mean +- standard deviation over seeds; 95 %: its binomial interval (Wilson) as
    middle +- half; lost: against the unpatched model on the same canvases, +- half its 95 % interval.

Nothing is trained. Beside OUT.json come OUT_MEASURE.json, .csv and .png for each measure.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from options import begin, frame, parse, parser, write
from torch import Tensor, nn
from tqdm import tqdm

import vtoken
from vtoken.accounting import compare
from vtoken.accounting.compare import Quality, Row
from vtoken.accounting.timing import interleaved
from vtoken.cli.settings import add_sweep, sweep
from vtoken.core.config import MethodConfig
from vtoken.demo.clutter import DATA, load_clutter_vit, load_test_canvases
from vtoken.demo.photos import load_photographs, photograph_names
from vtoken.demo.saliency import NATIVE_SIZE, SaliencyViT, load_saliency_vit, normalise
from vtoken.errors import VTokenError

METHODS = ["pitome", "tome", "random_merge", "random_prune", "stride"]
FLAT = ("moon", "hubble")  # nearly flat saliency maps: a correlation with them measures noise
SMALLER = {"dense": (168, 126), "clutter": (80, 56)}  # sides of the low-resolution controls, in pixels
HEADLINE = {"dense": "saliency corr", "clutter": "top-1"}
TITLE = {
    "dense": "DINOv2 ViT-S/14 (saliency) on photographs",
    "clutter": "cluttered Fashion-MNIST, ViT 96 wide, 8 deep, 196 patches",
}


def dense(args: argparse.Namespace, device: torch.device, tick: Callable[[], object]) -> list[Row]:
    """Fidelity of saliency maps and class tokens, per setting."""
    names = [name for name in photograph_names() if name not in FLAT][: args.photos]

    def load(side: int) -> tuple[SaliencyViT, Tensor]:
        model = load_saliency_vit(side).requires_grad_(False).to(device)
        return model, normalise(load_photographs(side, names)[1]).to(device)

    model, images = load(NATIVE_SIZE)
    reference = dense_outputs(model, images)

    def fidelity(config: MethodConfig | None) -> Mapping[str, Tensor]:
        return agreement(dense_outputs(model, images), reference)

    configs, batch = [reseeded(config, args.seed) for config in sweep(args)], images[:4]
    rows = compare.compare(
        model.backbone, configs, batch, rounds=args.rounds, quality=fidelity, ideal=False, tick=tick
    )  # fmt: skip
    for side in SMALLER["dense"]:
        small, shrunk = load(side)
        figures = agreement(dense_outputs(small, shrunk), reference)
        quality = {name: Quality(float(v.mean()), float(v.std(unbiased=False))) for name, v in figures.items()}
        rows.append(low_resolution(model.backbone, small.backbone, batch, shrunk[:4], args.rounds, quality))
    return rows


def dense_outputs(model: SaliencyViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Class tokens [N, C] and saliency at the native size [N, 224 * 224], whatever the images' size."""
    with torch.inference_mode():
        cls, features = model.features(images)
        return cls, model.decoder(features, (NATIVE_SIZE, NATIVE_SIZE)).flatten(1)


def agreement(found: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Figures [N] of what `dense_outputs` gave against what it gave for the unpatched model."""
    (cls, saliency), (full_cls, full_saliency) = found, reference
    centred, full_centred = (s - s.mean(1, keepdim=True) for s in (saliency, full_saliency))
    return {
        "saliency corr": torch.cosine_similarity(centred, full_centred),
        "saliency err": (saliency - full_saliency).abs().mean(1),
        "CLS cosine": torch.cosine_similarity(cls, full_cls),
    }


def clutter(args: argparse.Namespace, device: torch.device, tick: Callable[[], object]) -> list[Row]:
    """Top-1, per setting."""
    model = load_clutter_vit().requires_grad_(False).to(device)
    seeds = range(args.seed, args.seed + args.seeds)
    loaded = [load_test_canvases(args.images, seed, args.data) for seed in seeds]
    sets = [(canvases.to(device), labels.to(device)) for canvases, labels in loaded]
    configs, batch = sweep(args), sets[0][0][:16]
    base = torch.stack([hits(model, *part, tick) for part in sets])
    rows = compare.compare(model, configs, batch, rounds=args.rounds, ideal=False, tick=tick)
    found = [base]
    for config in configs:
        right = []
        for seed, part in zip(seeds, sets, strict=True):
            with vtoken.applied(model, reseeded(config, seed)):
                right.append(hits(model, *part, tick))
        found.append(torch.stack(right))
    rows = [dataclasses.replace(row, quality=top1(h, base)) for row, h in zip(rows, found, strict=True)]
    for side in SMALLER["clutter"]:
        small = copy.deepcopy(model)
        small.set_input_size(img_size=(side, side))  # resamples the positions
        shrunk = [(F.interpolate(canvases, (side, side), mode="bilinear", antialias=True), labels)
                  for canvases, labels in sets]  # fmt: skip
        quality = top1(torch.stack([hits(small, *part, tick) for part in shrunk]), base)
        rows.append(low_resolution(model, small, batch, shrunk[0][0][:16], args.rounds, quality))
    return rows


def hits(model: nn.Module, canvases: Tensor, labels: Tensor, tick: Callable[[], object]) -> Tensor:
    """Which answers are right, [N], 1.0 or 0.0."""
    right = []
    with torch.inference_mode():
        for part, answers in zip(canvases.split(50), labels.split(50), strict=True):
            right.append((model(part).argmax(-1) == answers).float())
            tick()
    return torch.cat(right).cpu()


def top1(right: Tensor, base: Tensor) -> dict[str, Quality]:
    """Figures of the right answers [seeds, images] of a setting; `base` are those of the unpatched model."""
    over_seeds = float(right.mean(1).std()) if len(right) > 1 else 0.0
    lost, count = (base - right).flatten(), right.numel()
    low, high = wilson(int(right.sum()), count)
    return {
        "top-1": Quality(float(right.mean()), over_seeds),
        "top-1, 95 %": Quality((low + high) / 2, (high - low) / 2),
        "lost": Quality(float(lost.mean()), 1.96 * float(lost.std()) / math.sqrt(count)),
    }


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Ends of the Wilson score interval of a share; 95 % for z = 1.96."""
    share, weight = successes / count, z * z / count
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / count + weight / (4 * count)) / (1 + weight)
    return middle - half, middle + half


def reseeded(config: MethodConfig, seed: int) -> MethodConfig:
    """The setting with another seed, if it draws at all."""
    return config.replace(seed=seed) if hasattr(config, "seed") else config


def low_resolution(
    full: nn.Module, small: nn.Module, images: Tensor, shrunk: Tensor, rounds: int, quality: dict[str, Quality]
) -> Row:
    """The row of the unpatched model on smaller images: the plainest way to fewer tokens."""

    def run(model: nn.Module, batch: Tensor) -> None:
        with torch.inference_mode():
            model(batch)

    def cost(model: nn.Module, batch: Tensor) -> vtoken.Report:
        return vtoken.report(model, vtoken.ToMe(ratio=1.0), input_size=(batch.shape[1], batch.shape[2], batch.shape[3]))

    times = interleaved(
        {"full": lambda: run(full, images), "small": lambda: run(small, shrunk)}, rounds=rounds, device=images.device
    )
    spent, base, after = times["small"], times["full"], cost(small, shrunk)
    factor, side = cost(full, images).macs_before / after.macs_before, shrunk.shape[-1]
    return Row(
        name=f"low resolution {side} px",
        method={"method": "low resolution", "side": side},
        tokens=after.tokens[0],
        gmacs=after.macs_before / 1e9,
        flops_factor=factor,
        speedup=base.median / spent.median,
        speedup_min=base.minimum / spent.minimum,
        efficiency=base.median / spent.median / factor,
        ideal_efficiency=None,
        milliseconds=spent.median * 1e3,
        quality=quality,
        milliseconds_min=spent.minimum * 1e3,
        samples=spent.samples,
        dropped=spent.dropped,
    )


def save(args: argparse.Namespace, device: torch.device, found: Mapping[str, Sequence[Row]]) -> None:
    """The result file, and for each measure JSON, CSV and picture beside it."""
    from vtoken.visualize import plot_pareto

    write(args, device, [{"measure": name} | dataclasses.asdict(row) for name, rows in found.items() for row in rows])
    for name, rows in found.items():
        stem = f"{args.out.stem}_{name}"
        paths = compare.write(rows, args.out.parent, stem, frame(args, device) | {"measure": name})
        paths.append(plot_pareto(rows, args.out.parent / f"{stem}.png", quality=HEADLINE[name], title=TITLE[name]))
        print("wrote " + ", ".join(map(str, paths)))


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table per measure, write the results; 2 if the images or the models are not installed."""
    top = parser("quality", __doc__, rounds=5)
    top.add_argument("--measure", nargs="+", choices=["dense", "clutter"], default=["dense", "clutter"])
    top.add_argument("--photos", type=int, default=9, help="photographs (dense)")
    top.add_argument("--images", type=int, default=1000, help="test canvases per seed (clutter)")
    top.add_argument("--seeds", type=int, default=3, help="how many seeds, from --seed on (clutter)")
    top.add_argument("--data", type=Path, default=DATA, help="folder of the Fashion-MNIST files (clutter)")
    add_sweep(top, METHODS, [0.95, 0.9, 0.8, 0.7])
    args = parse(top, argv, {"photos": 2, "images": 50, "seeds": 2, "ratio": [0.8], "rounds": 1})
    device = begin(args)
    found: dict[str, list[Row]] = {}
    try:
        for name in dict.fromkeys(args.measure):
            with tqdm(desc=name, unit="run", leave=False) as bar:
                found[name] = (dense if name == "dense" else clutter)(args, device, bar.update)
            amount = (f"{args.photos} photographs" if name == "dense"
                      else f"{args.seeds} seeds of {args.images} test canvases")  # fmt: skip
            print(f"\n{TITLE[name]}, {amount}, {args.threads} thread(s), {device}")
            print(compare.table(found[name]) + "\n")
        save(args, device, found)
    except (VTokenError, ImportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
