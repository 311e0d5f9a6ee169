"""Tuned schedules (`vtoken.tune`) against one ratio and one r of equal FLOPs, on images that tuning never saw.

clutter: the shipped ViT on cluttered Fashion-MNIST; canvases of other garments for tuning and for the test.
dense: the pretrained DINOv2 ViT-S/14 on crops of photographs; whole photographs are for tuning or for the test.

change: the squared change of logits or class token in parts of its square, mean over test images. Against a constant
schedule: quotient of the two changes, below 1 is better, and their difference with the half width of its 95 % interval,
paired over canvases, or over photographs, whose crops are no independent images. Every seed draws images, their split
and what `tune` draws.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from options import begin, parse, parser, run, write
from torch import Tensor, nn

import vtoken
from vtoken.demo.clutter import DATA, load_clutter_vit, load_test_canvases
from vtoken.demo.photos import load_photographs
from vtoken.demo.saliency import NATIVE_SIZE, load_saliency_vit, normalise

CONSTANT = ("constant ratio", "constant r")


class Images(NamedTuple):
    """What one seed draws: images for tuning, images for the test, their labels, and which are drawn together."""

    tuning: Tensor
    test: Tensor
    labels: Tensor | None
    groups: Tensor


def clutter(args: argparse.Namespace, seed: int) -> Images:
    """Canvases [N, 1, 112, 112] of different garments."""
    canvases, labels = load_test_canvases(args.tuning + args.test, seed, args.data)
    tuning, test = canvases.split([args.tuning, args.test])
    return Images(tuning, test, labels[args.tuning :], torch.arange(args.test))


def dense(args: argparse.Namespace, seed: int) -> Images:
    """Crops [N, 3, 224, 224] of photographs: of two thirds of them for tuning, of the others for the test."""
    generator = torch.Generator().manual_seed(seed)
    photographs = load_photographs(2 * NATIVE_SIZE)[1]
    order = torch.randperm(len(photographs), generator=generator).tolist()
    found = {name: [crop(photographs[i], generator) for i in part for _ in range(args.crops)]
             for name, part in (("tuning", order[4:]), ("test", order[:4]))}  # fmt: skip
    groups = torch.arange(4).repeat_interleave(args.crops)
    return Images(normalise(torch.stack(found["tuning"])), normalise(torch.stack(found["test"])), None, groups)


def crop(photograph: Tensor, generator: torch.Generator) -> Tensor:
    """A square of half to all of the sides of [3, S, S], resized to 224 pixels."""
    whole = photograph.shape[-1]
    side = int(torch.randint(whole // 2, whole + 1, (), generator=generator))
    top, left = (int(torch.randint(whole - side + 1, (), generator=generator)) for _ in range(2))
    part = photograph[None, :, top : top + side, left : left + side]
    return F.interpolate(part, (NATIVE_SIZE, NATIVE_SIZE), mode="bilinear", antialias=True)[0]


def outputs(model: nn.Module, images: Tensor, config: Any = None) -> Tensor:
    """[N, C] of a model that carries nothing, with or without a setting."""
    if config is not None:
        with vtoken.applied(model, config):
            return outputs(model, images)
    with torch.inference_mode():
        return torch.cat([model(part) for part in images.split(16)])


def grouped(values: Tensor, groups: Tensor) -> Tensor:
    """Means of [N] over the images of each group."""
    return torch.stack([values[groups == group].mean() for group in groups.unique()])


def judged(args: argparse.Namespace, model: nn.Module, images: Images, method: str, target: float, seed: int) -> Any:
    """One row: what was tuned, and for it and the constant schedules the figures on the test images."""
    options = {"rounds": args.tune_rounds, "batch": 16, "seed": seed}
    found = vtoken.tune(model, images.tuning, target, method, progress=False, **options)
    full = outputs(model, images.test)
    schedules = {row.name: row for row in found.table if row.name in CONSTANT} | {"tuned": found.best}
    figures, changes = {}, {}
    for name, row in schedules.items():
        now = outputs(model, images.test, row.config)
        change = (now - full).square().sum(1) / full.square().sum(1)
        changes[name] = grouped(change, images.groups)
        figures[name] = {"flops": row.flops, "tuning": row.change, "change": float(change.mean())}
        if images.labels is not None:
            figures[name]["top1"] = float((now.argmax(1) == images.labels).float().mean())
    row = {"part": "seed", "method": method, "target": target, "seed": seed, "form": found.best.name,
           "schedule": found.config.to_dict(), "figures": figures}  # fmt: skip
    print(f"{method} {target} seed {seed}: {found.best.name}; " + ", ".join(
        f"{name} {f['flops']:.4f} {f['change']:.3e}" for name, f in figures.items()), flush=True)  # fmt: skip
    return row, changes


def summary(method: str, target: float, rows: Sequence[Any], changes: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """Tuned against constant, all seeds together."""
    tuned, against = torch.cat([each["tuned"] for each in changes]), {}
    for name in CONSTANT:
        other = torch.cat([each[name] for each in changes])
        gap = tuned - other
        against[name] = {"quotient": float(tuned.mean() / other.mean()), "difference": float(gap.mean()),
                         "half": 1.96 * float(gap.std()) / math.sqrt(len(gap))}  # fmt: skip
    means = {
        name: {key: sum(row["figures"][name][key] for row in rows) / len(rows) for key in rows[0]["figures"][name]}
        for name in (*CONSTANT, "tuned")
    }
    return {"part": "summary", "method": method, "target": target, "seeds": len(rows), "units": len(tuned),
            "forms": [row["form"] for row in rows], "means": means, "against": against}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print and write the rows."""
    top = parser("tune", __doc__)
    top.add_argument("--measure", nargs="+", choices=["clutter", "dense"], default=["clutter", "dense"])
    top.add_argument("--method", nargs="+", default=["pitome", "tome"])
    top.add_argument("--seeds", type=int, default=3, help="how many seeds, from --seed on")
    top.add_argument("--targets", type=float, nargs="+", default=[0.55, 0.4], help="shares of FLOPs (clutter)")
    top.add_argument("--dense-targets", type=float, nargs="+", default=[0.55], help="shares of FLOPs (dense)")
    top.add_argument("--tuning", type=int, default=128, help="canvases for tuning (clutter)")
    top.add_argument("--test", type=int, default=400, help="canvases for the test (clutter)")
    top.add_argument("--crops", type=int, default=4, help="crops of a photograph (dense)")
    top.add_argument("--tune-rounds", type=int, default=1, help="rounds of `vtoken.tune`")
    top.add_argument("--data", type=Path, default=DATA, help="folder of the Fashion-MNIST files (clutter)")
    args = parse(top, argv, {"seeds": 2, "targets": [0.5], "method": ["tome"], "tuning": 8, "test": 8, "crops": 1,
                             "measure": ["clutter"]})  # fmt: skip
    device, rows = begin(args), []
    draws: dict[str, tuple[Callable[..., Images], Callable[[], nn.Module], list[float]]] = {
        "clutter": (clutter, load_clutter_vit, args.targets),
        "dense": (dense, lambda: load_saliency_vit().backbone, args.dense_targets),
    }
    for name in dict.fromkeys(args.measure):
        draw, load, targets = draws[name]
        model = load().requires_grad_(False).to(device)
        seeds = range(args.seed, args.seed + args.seeds)
        drawn = [draw(args, seed) for seed in seeds]
        for method in args.method:
            for target in targets:
                found = [judged(args, model, images, method, target, seed)
                         for seed, images in zip(seeds, drawn, strict=True)]  # fmt: skip
                rows += [{"measure": name} | row for row, _ in found]
                rows.append({"measure": name} | summary(method, target, *zip(*found, strict=True)))
                for other, gap in rows[-1]["against"].items():
                    print(f"{name} {method} {target}: {gap['quotient']:.2f} of {other}'s change, difference "
                          f"{gap['difference']:+.2e} +- {gap['half']:.1e}", flush=True)  # fmt: skip
    write(args, device, rows)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
