"""`python -m vtoken bench`: any supported timm model, any methods and amounts, on random or real images."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from vtoken.accounting import compare
from vtoken.accounting.break_even import break_even, is_slower, told
from vtoken.cli import weights
from vtoken.cli.images import load_images
from vtoken.cli.settings import sweep
from vtoken.core.config import MethodConfig
from vtoken.errors import ConfigError


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write JSON, CSV and the Pareto plot."""
    from tqdm import tqdm

    from vtoken.visualize import plot_pareto
    from vtoken.visualize.figure import new_figure

    new_figure()  # where matplotlib is missing, that is told before minutes of measuring
    configs = sweep(args)
    device = _device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = weights.build_model(args).to(device)
    images, labels = load_images(args, model)
    quality = _Agreement(model, images, labels, args.batch)
    with tqdm(total=(1 + 2 * len(configs)) * (args.rounds + 1), desc="measuring", unit="run") as bar:
        rows = compare.compare(
            model, configs, images[: args.batch], rounds=args.rounds, quality=quality, tick=bar.update
        )  # fmt: skip
    source = weights.describe_weights(args)
    note = " (agreement says little)" if source == "random weights" else ""
    inputs = f"{len(images)} images of {args.data}" if args.data else "random images"
    batch = min(args.batch, len(images))
    print(f"\n{args.model}, {source}{note}, {inputs}, batch {batch}, {args.threads} thread(s), {args.device}")
    print(compare.table(rows))
    found = {}
    for config, row in zip(configs, rows[1:], strict=True):
        if is_slower(row):
            found[row.name] = break_even(model, config, images[: args.batch], rounds=min(args.rounds, 5))
            print(told(row, batch, found[row.name]))
    about = {"command": "bench", "arguments": vars(args), "environment": compare.environment(images.device)}
    about["break_even"] = {name: asdict(each) for name, each in found.items()}
    written = compare.write(rows, args.out, args.model, about)
    title = f"{args.model}, {source}: agreement with the unpatched model"
    written.append(plot_pareto(rows, args.out / f"{args.model}.png", quality="feature cosine", title=title))
    print("wrote " + ", ".join(str(path) for path in written))
    return 0


def _device(name: str) -> torch.device:
    """The device of that name, if this machine has it."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if accelerator is not None else 0
    there = ["cpu", *([accelerator.type, *(f"{accelerator.type}:{i}" for i in range(count))] if accelerator else [])]
    if name not in there:
        raise ConfigError(f"--device {name}: this machine has {', '.join(there)}")
    return torch.device(name)


class _Agreement:
    """Pooled features and predictions against the unpatched model's; top-1 where the labels fit the head."""

    def __init__(self, model: Any, images: Tensor, labels: Tensor | None, batch: int) -> None:
        self.model, self.images, self.batch = model, images, batch
        classes = int(getattr(model, "num_classes", 0))
        self.labels = labels if labels is not None and int(labels.max()) < classes else None
        self.reference: tuple[Tensor, Tensor] | None = None

    def __call__(self, config: MethodConfig | None) -> Mapping[str, Tensor]:
        with torch.inference_mode():
            logits = torch.cat([self.model(part) for part in self.images.split(self.batch)]).float()
            head: Callable[..., Tensor] = self.model.forward_head
            features = torch.cat(
                [head(self.model.forward_features(part), pre_logits=True) for part in self.images.split(self.batch)]
            ).float()
        if self.reference is None or config is None:
            self.reference = (features, logits)
        found = {"feature cosine": torch.cosine_similarity(features.flatten(1), self.reference[0].flatten(1))}
        if logits.shape[-1] > 1 and self.labels is None:
            found["same top-1"] = (logits.argmax(-1) == self.reference[1].argmax(-1)).float()
        if self.labels is not None:
            found["top-1"] = (logits.argmax(-1) == self.labels).float()
        return found
