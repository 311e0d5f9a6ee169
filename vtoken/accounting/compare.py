"""Methods side by side on one model: tokens, multiply-adds, measured time, quality; as table, JSON and CSV."""

from __future__ import annotations

import contextlib
import csv
import datetime
import importlib.metadata
import json
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.accounting.ideal import Ideal
from vtoken.accounting.report import Report, costs, report
from vtoken.accounting.shadow import shared_copy
from vtoken.accounting.timing import interleaved
from vtoken.core.apply import applied, apply, is_applied, remove
from vtoken.core.config import MethodConfig
from vtoken.core.counts import chosen, removing
from vtoken.core.host import host_of
from vtoken.core.spec import Plan
from vtoken.core.trace import tracing
from vtoken.errors import ConfigError

SCHEMA = 1
# Name in result files -> distribution.
_PACKAGES = {"vtoken": "vtoken", "timm": "timm", "open_clip": "open_clip_torch",
             "transformers": "transformers", "triton": "triton"}  # fmt: skip


@dataclass(frozen=True)
class Quality:
    """A figure over images: mean and standard deviation."""

    mean: float
    spread: float


@dataclass(frozen=True)
class Row:
    """One setting of one method.

    Args:
        name: shown in tables.
        method: the settings, as `MethodConfig.to_dict`.
        tokens: after the last block, prefix included; where the images decide, of the timed batch.
        gmacs: per image, matching included; likewise.
        flops_factor: FLOPs of the unpatched model / FLOPs of this one.
        speedup, speedup_min: time unpatched / time patched, by medians and by minima.
        efficiency: speedup / flops_factor.
        ideal_efficiency: the same for plain narrowing to the same token counts (None if not timed).
        milliseconds: median per batch.
        quality: figures against the unpatched model.
        milliseconds_min: smallest per batch.
        samples, dropped: undisturbed timing samples, and those that a busy machine spoilt (see `Timing`).
    """

    name: str
    method: dict[str, Any]
    tokens: int
    gmacs: float
    flops_factor: float
    speedup: float
    speedup_min: float
    efficiency: float
    ideal_efficiency: float | None
    milliseconds: float
    quality: dict[str, Quality]
    milliseconds_min: float | None = None
    samples: int = 0
    dropped: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Row:
        """The row that `asdict` made these values of."""
        return cls(**{**values, "quality": {name: Quality(**q) for name, q in values["quality"].items()}})


def label(config: MethodConfig | None) -> str:
    """A short name of a setting: method and amount."""
    if config is None:
        return "unpatched"
    amount = {"ratio": getattr(config, "ratio", None), "r": getattr(config, "r", None)}
    given = [f"{k}={v:g}" if isinstance(v, (int, float)) else f"{k}={v}" for k, v in amount.items() if v is not None]
    return " ".join([config.method, *given]) if given else f"{config.method} {getattr(config, 'stride', '')}".strip()


def compare(
    model: nn.Module,
    configs: Sequence[MethodConfig],
    images: Tensor,
    *,
    rounds: int = 5,
    warmup: int = 1,
    quality: Callable[[MethodConfig | None], Mapping[str, Tensor]] | None = None,
    ideal: bool = True,
    compiled: bool = False,
    calls: int = 1,
    tick: Callable[[], object] | None = None,
) -> list[Row]:
    """Measure every setting on `model` (which carries none) against the model itself.

    Args:
        model: a supported model in eval mode.
        configs: settings to compare.
        images: the batch that is timed, [B, C, H, W].
        rounds: timing samples per setting, after `warmup` that do not count; all settings are interleaved.
        quality: figures per image of the model as it is patched right now, by name, [images]; called with None for the
            unpatched model first.
        ideal: also time plain narrowing to the same token counts.
        compiled: time torch.compile'd models, each compiled for this batch.
        calls: calls that make one timing sample.
        tick: called after each timed run.

    Returns:
        The unpatched model's row, then one per setting.
    """
    if is_applied(model):
        raise ConfigError("compare patches the model itself; vtoken.remove what it carries first")
    reports = {label(c): _report_of(model, c, images) for c in configs}
    figures = {label(c): _figures(model, c, quality) for c in [None, *configs]} if quality else {}
    variants: dict[str, MethodConfig | None] = {label(c): c for c in [None, *configs]}
    ideals = {label(c): _ideal_of(c, reports[label(c)]) for c in configs} if ideal else {}
    variants |= {f"ideal of {name}": narrow for name, narrow in ideals.items() if narrow is not None}
    with torch._dynamo.config.patch(recompile_limit=4 * len(variants)) if compiled else contextlib.nullcontext():
        runs = {name: runner(model, config, images, compiled=compiled) for name, config in variants.items()}
        times = interleaved(runs, rounds=rounds, warmup=warmup, calls=calls, device=images.device, tick=tick)
    base = times["unpatched"]
    first = reports[label(configs[0])]
    rows = [Row("unpatched", {}, first.tokens[0], first.macs_before / 1e9, 1.0, 1.0, 1.0, 1.0, None, base.median * 1e3,
                figures.get("unpatched", {}), base.minimum * 1e3, base.samples, base.dropped)]  # fmt: skip
    for config in configs:
        name = label(config)
        cost, spent, narrow = reports[name], times[name], times.get(f"ideal of {name}")
        factor = cost.flops_factor
        rows.append(
            Row(
                name=name,
                method=config.to_dict(),
                tokens=cost.tokens[-1],
                gmacs=cost.macs_after / 1e9,
                flops_factor=factor,
                speedup=base.median / spent.median,
                speedup_min=base.minimum / spent.minimum,
                efficiency=base.median / spent.median / factor,
                ideal_efficiency=None if narrow is None else base.median / narrow.median / factor,
                milliseconds=spent.median * 1e3,
                quality=figures.get(name, {}),
                milliseconds_min=spent.minimum * 1e3,
                samples=spent.samples,
                dropped=spent.dropped,
            )
        )
    return rows


def runner(
    model: nn.Module, config: MethodConfig | None, images: Tensor, *, compiled: bool = False
) -> Callable[[], object]:
    """A call that runs a copy of the model (over the same weights) with a method applied, without gradients."""
    host, network = host_of(model), shared_copy(model)
    if config is not None:
        apply(network, config)

    def forward(x: Tensor) -> Any:
        return host.adapter.run_image(network, x)

    # fullgraph: a model that fell back to eager without a word would be timed as if it were compiled.
    call = torch.compile(forward, fullgraph=True, dynamic=False) if compiled else forward

    def run() -> None:
        with torch.inference_mode():
            call(images)

    return run


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    names = list(dict.fromkeys(q for row in rows for q in row.quality))
    width = max(len(row.name) for row in rows)
    head = f"{'':<{width}} {'tokens':>6} {'GMACs':>7} {'FLOPs x':>7} {'speed x':>7} {'(min)':>6} "
    head += f"{'effic.':>6} {'ideal':>6}"
    lines = [head + "".join(f" {name:>16}" for name in names)]
    for row in rows:
        ideal = "" if row.ideal_efficiency is None else f"{row.ideal_efficiency:.2f}"
        cells = (
            f"{row.tokens:>6} {row.gmacs:>7.2f} {row.flops_factor:>7.2f} {row.speedup:>7.2f} {row.speedup_min:>6.2f}"
        )
        found = [row.quality.get(name) for name in names]
        figures = "".join(f" {'' if q is None else f'{q.mean:.3f} +- {q.spread:.3f}':>16}" for q in found)
        lines.append(f"{row.name:<{width}} {cells} {row.efficiency:>6.2f} {ideal:>6}{figures}")
    return "\n".join(lines)


def command(program: str, arguments: Sequence[str]) -> str:
    """The line that runs a script again; where its files went (--out FOLDER) does not belong to what it did."""
    kept = [argument for argument in arguments if not argument.startswith("--out=")]
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return shlex.join(["python", program, *kept])


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code, and the day."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {name: _version(package) for name, package in _PACKAGES.items()}
    day = datetime.date.today().isoformat()
    return {"date": day, "device": f"{device.type}: {name}", "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": torch.__version__} | versions  # fmt: skip


def write_json(path: Path, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write one file of results: "schema", everything in `about`, then "rows"; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"schema": SCHEMA, **about, "rows": list(rows)}
    path.write_text(json.dumps(values, indent=1, default=str) + "\n")
    return path


def write(rows: Sequence[Row], folder: Path, stem: str, about: Mapping[str, Any]) -> list[Path]:
    """Write `stem`.json (with "schema" and everything in `about`) and `stem`.csv; returns their paths."""
    json_path = write_json(folder / f"{stem}.json", about, [asdict(row) for row in rows])
    csv_path = folder / f"{stem}.csv"
    names = list(dict.fromkeys(q for row in rows for q in row.quality))
    plain = [f for f in Row.__dataclass_fields__ if f not in ("method", "quality")]
    with csv_path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(plain + [f"{name} {part}" for name in names for part in ("mean", "spread")])
        for row in rows:
            found = [row.quality.get(name) for name in names]
            figures = [v for q in found for v in ((None, None) if q is None else (q.mean, q.spread))]
            writer.writerow([getattr(row, f) for f in plain] + figures)
    return [json_path, csv_path]


def read(path: Path) -> list[Row]:
    """The rows of a JSON file that `write` made.

    Raises:
        ConfigError: if it is no such file.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        values = json.loads(path.read_text())
        rows = [Row.of(row) for row in values["rows"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a result of vtoken's demo or bench: {error!r}") from error
    if values.get("schema") != SCHEMA:
        raise ConfigError(f"{path} has schema {values.get('schema')!r}, this vtoken reads {SCHEMA}")
    return rows


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _report_of(model: nn.Module, config: MethodConfig, images: Tensor) -> Report:
    """What the method costs on these images: where they decide how many tokens are left, they are asked."""
    channels, height, width = (int(n) for n in images.shape[1:])
    host, configs, methods = chosen(model, config, {})
    if removing(methods).exact:
        return report(model, config, input_size=(channels, height, width))
    with applied(model, config), torch.inference_mode(), tracing(model) as trace:
        host.adapter.run_image(model, images)
    found = Plan(tuple(trace.tokens), trace.num_prefix)
    return costs(host, configs, methods, (channels, height, width), found)


def _ideal_of(config: MethodConfig, cost: Report) -> Ideal | None:
    if getattr(config, "ratio", None) is None and getattr(config, "r", None) is None:
        return None
    removed = tuple(a - b for a, b in zip(cost.tokens, cost.tokens[1:], strict=False))
    return Ideal(removed=removed, place=getattr(config, "place", "between"))


def _figures(model: nn.Module, config: MethodConfig | None, quality: Any) -> dict[str, Quality]:
    if config is not None:
        apply(model, config)
    try:
        found = quality(config)
    finally:
        if config is not None:
            remove(model)
    return {name: Quality(float(v.mean()), float(v.std(unbiased=False))) for name, v in found.items()}
