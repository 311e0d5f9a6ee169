"""The verb `tune`: a schedule for a target cost, per block where the model's own output changes least."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vtoken import checks
from vtoken.accounting.compare import runner
from vtoken.accounting.report import Report
from vtoken.accounting.shadow import shared_copy
from vtoken.accounting.timing import interleaved
from vtoken.core.apply import is_applied, resolve
from vtoken.core.config import MethodConfig
from vtoken.core.host import host_of, refuse_compiled
from vtoken.errors import AlreadyAppliedError, ConfigError
from vtoken.methods.merging.base import ScheduledMergeConfig
from vtoken.tuning.change import OutputChange, ScoreChange
from vtoken.tuning.cost import Costs
from vtoken.tuning.images import gathered
from vtoken.tuning.search import Curve, constant, per_block, removing, shares

#: Images on which blocks are tried one by one; whole schedules are tried on all.
_PROBES = 64
#: How far a round moves the share that a block removes, in parts of the mean share.
_REACH = 0.5
#: Timing samples of a schedule, and how often the search is repeated with fewer FLOPs if all turn out too slow.
_SAMPLES, _TRIALS = 7, 4


@dataclass(frozen=True)
class Tried:
    """A schedule that was tried on all images.

    Args:
        name: of its form.
        config: the settings.
        flops: FLOPs with it / without it, as `vtoken.report` counts.
        change: what the outputs change by: squared, in parts of their squares, mean over images; or what it takes from
            the score. Least is best.
        error: standard error of that over the images; None with a function.
        milliseconds: of a batch; None unless milliseconds were the target.
    """

    name: str
    config: ScheduledMergeConfig
    flops: float
    change: float
    error: float | None = None
    milliseconds: float | None = None


@dataclass(frozen=True)
class Tuned:
    """What `vtoken.tune` found.

    Args:
        config: the best settings that meet the target, for `vtoken.apply`.
        table: all that were tried whole, the unbroken constant schedules first.
        report: what `config` costs on one image.
    """

    config: ScheduledMergeConfig
    table: tuple[Tried, ...]
    report: Report

    @property
    def best(self) -> Tried:
        """The row of `config`."""
        return next(row for row in self.table if row.config == self.config)

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready; `vtoken.config_from_dict` reads its "config"."""
        rows = [asdict(replace(row)) | {"config": row.config.to_dict()} for row in self.table]
        return {"config": self.config.to_dict(), "table": rows, "report": self.report.to_dict()}

    def __str__(self) -> str:
        timed = any(row.milliseconds is not None for row in self.table)
        width = max(len(row.name) for row in self.table)
        head = f"  {'':<{width}} {'FLOPs':>7} {'change':>10} {'+-':>9}"
        lines = [head + (f" {'ms':>9}" if timed else "") + "  removed"]
        for row in self.table:
            mark = "*" if row.config == self.config else " "
            error = "" if row.error is None else f"{row.error:.2e}"
            time = f" {row.milliseconds:>9.2f}" if row.milliseconds is not None else " " * 10 if timed else ""
            amount = f"ratio {row.config.ratio:.4g}" if isinstance(row.config.ratio, float) else f"r {row.config.r}"
            lines.append(f"{mark} {row.name:<{width}} {row.flops:>7.4f} {row.change:>10.3e} {error:>9}{time}  {amount}")
        return "\n".join(lines)


def tune(
    model: nn.Module,
    images: Any,
    target: float | None = None,
    method: MethodConfig | str = "pitome",
    *,
    milliseconds: float | None = None,
    batch: int = 16,
    limit: int = 256,
    rounds: int = 2,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Tuned:
    """Settings of a merging method that meet a target cost and change the model's own output least.

    Constant schedules (one ratio, one r, shares that fall or rise over the blocks) are tried on all images. Around the
    best of them every block is tried with fewer and with more tokens removed, on 64 of the images; a change counts as
    its mean plus one standard error, so that noise moves nothing. Dynamic programming spends the target on these, and
    what it finds is tried whole, on all images. The best of all that were tried is returned: on these images it is
    never worse than a constant schedule. On others it may be, with few images above all: benchmarks/README.md, "Tuned
    schedules". Keep images apart and look.

    The model is not changed, nor is the random state; a copy over the same weights runs, in eval mode. The same seed
    gives the same settings, where FLOPs are the target. A ViT-S and 256 images take minutes on a CPU.

    Args:
        model: a supported model that carries no method.
        images: some hundred without labels, as the model takes them: [N, C, H, W], a list of batches, or a DataLoader
            (its labels are left alone). Or a function that is called with a patched model and returns a score, higher
            is better; it must run the model that it is given.
        target: FLOPs as a share of the unpatched model's, in (0, 1), as `vtoken.report` counts. They are met with the
            fewest tokens removed that fit.
        method: "pitome", "tome" or another merging method with a schedule, its settings as `options`; or settings, of
            which ratio and r are replaced.
        milliseconds: instead of `target`: what one forward of a batch may take on the device of the model, with the
            threads that torch has now. Times vary from run to run, and so may what is found.
        batch: images that run at once.
        limit: how many images are used, at most; the first ones.
        rounds: how often blocks are tried one by one; with 0 only constant schedules are.
        seed: draws the images on which that is done.
        progress: whether a bar is shown on stderr.

    Raises:
        ConfigError: if the method has no schedule, if the target cannot be reached, or for wrong values.
        InputError, ShapeError: for images that are none.
        AlreadyAppliedError: if the model carries a method.
        UnsupportedModelError: as `vtoken.apply`.

    Example:
        >>> import timm, torch, vtoken
        >>> model = timm.create_model("test_vit").eval()
        >>> found = vtoken.tune(model, torch.randn(4, 3, 160, 160), target=0.7, method="tome", rounds=1, progress=False)
        >>> cost = vtoken.report(model, found.config)
        >>> cost.flops_after <= 0.7 * cost.flops_before, len(found.config.r or model.blocks) == len(model.blocks)
        (True, True)
    """
    config = _schedule(method, options)
    if (target is None) == (milliseconds is None):
        raise ConfigError("tune: give target=0.6, a share of the model's FLOPs, or milliseconds=12.0, one of them")
    if target is not None:
        what = "the share of the model's FLOPs to spend, "
        target = checks.number("tune", "target", target, above=0, below=1, what=what)
    else:
        milliseconds = checks.number("tune", "milliseconds", milliseconds, above=0)
    batch, limit = checks.whole("tune", "batch", batch, 1), checks.whole("tune", "limit", limit, 1)
    rounds, seed = checks.whole("tune", "rounds", rounds, 0), checks.whole("tune", "seed", seed, 0)
    checks.flag("tune", "progress", progress)
    host = host_of(model)
    refuse_compiled(model, "tune")
    if is_applied(model):
        raise AlreadyAppliedError(
            f"this {type(model).__name__} carries a method: tune chooses settings for the model itself. vtoken.remove "
            "it first, and apply what is found"
        )
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if like.is_meta:
        raise ConfigError("tune runs the model, and this one has no weights (it is on the meta device)")
    network, most = shared_copy(model).eval(), config.replace(ratio=0.5)
    given: Tensor | None = None
    if callable(images) and not isinstance(images, (Tensor, nn.Module)):
        size = (host.adapter.channels(model), *host.image_size())
        sample = torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed)).to(like)
    else:
        given = gathered(images, limit).to(like)
        size, sample = (given.shape[1], given.shape[2], given.shape[3]), given[:batch]
    costs, probes = Costs(network, config, size), None
    if given is None:
        evaluate: OutputChange | ScoreChange = ScoreChange(network, images, most)
    else:
        evaluate = OutputChange(network, given, batch, most)
        drawn = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed))[:_PROBES]
        probes = drawn.sort().values
    clock = None if milliseconds is None else _Clock(network, sample, milliseconds)
    share = target if clock is None or target is not None else clock.share(costs)
    assert share is not None
    with tqdm(desc=f"tune {config.method}", unit="setting", disable=not progress, leave=False) as bar:
        search = _Search(costs, evaluate, probes, bar.update)
        for _ in range(1 if clock is None else _TRIALS):
            rows = search.run(share, rounds)
            if clock is None:
                break
            rows = clock.timed(rows)
            fastest = min(row.milliseconds or 0.0 for row in rows)
            fit = [row for row in rows if (row.milliseconds or 0.0) <= clock.limit]
            if fit:
                break
            share *= 0.98 * clock.limit / fastest
        else:
            raise ConfigError(f"tune(milliseconds={milliseconds!r}): nothing that was found is so fast; the fastest "
                              f"took {fastest:.2f}")  # fmt: skip
    best = min(rows if clock is None else fit, key=lambda row: row.change)
    return Tuned(best.config, tuple(rows), costs.report(best.config))


def _schedule(method: MethodConfig | str, options: dict[str, Any]) -> ScheduledMergeConfig:
    """The settings to be tuned, or a ConfigError that says why they cannot be."""
    given = {name for name in ("ratio", "r") if name in options}
    if given:
        raise ConfigError(f"tune finds {' and '.join(sorted(given))}: give the other settings only")
    (config, *others) = resolve(method, options)
    if others:
        raise ConfigError("tune takes one method; several at once have no one schedule")
    if config.part == "prompt":
        raise ConfigError(
            f"tune chooses how many tokens each block of a vision tower removes; {config.method} acts on a prompt, and "
            "how many image tokens an answer needs no image tells without its question. Try its amounts on your own "
            "task; vtoken.prompt_report counts what each costs"
        )
    if not isinstance(config, ScheduledMergeConfig):
        raise ConfigError(
            f"tune chooses ratio or r of merging methods such as pitome and tome; {config.method} has neither"
        )
    if not config.exact:
        raise ConfigError(
            f"tune cannot meet a target with {config.method}: the images decide how many tokens it removes"
        )
    return config


class _Search:
    """Tries schedules at a share of FLOPs.

    Args:
        costs: of the method on the model.
        evaluate: what a schedule changes.
        probes: images on which blocks are tried one by one; None where there is a function instead.
        tick: called after each setting that was tried.
    """

    def __init__(
        self, costs: Costs, evaluate: OutputChange | ScoreChange, probes: Tensor | None, tick: Callable[[], object]
    ) -> None:
        self._costs, self._evaluate, self._probes, self._tick = costs, evaluate, probes, tick

    def run(self, share: float, rounds: int) -> list[Tried]:
        """All that were tried whole."""
        budget, costs = share * self._costs.before, self._costs
        plain = constant(costs, budget)
        if "constant ratio" not in plain:
            least = costs.report(costs.config.replace(ratio=0.5))
            raise ConfigError(
                f"tune(target={share:.4g}): with {costs.config.method} this model cannot cost less than "
                f"{least.flops_after / least.flops_before:.4f} of its FLOPs, which it does where every block removes "
                "half of its tokens"
            )
        rows = [self._tried(name, config) for name, config in plain.items()]
        best = min(rows, key=lambda row: row.change)
        reach = _REACH * sum(shares(costs, costs.removed(best.config))) / len(costs.layers)
        for number in range(rounds):
            removed = per_block(costs, self._curves(costs.removed(best.config), reach), budget)
            if removed is None or any(costs.removed(row.config) == removed for row in rows):
                reach /= 2
                continue
            rows.append(self._tried(f"per block {number + 1}", removing(costs.config, removed)))
            best, reach = (rows[-1], reach) if rows[-1].change < best.change else (best, reach / 2)
        return rows

    def _tried(self, name: str, config: ScheduledMergeConfig) -> Tried:
        change = self._evaluate(config)
        self._tick()
        cost = self._costs.report(config)
        error = float(change.std() / math.sqrt(len(change))) if len(change) > 1 else None
        return Tried(name, config, cost.flops_after / cost.flops_before, float(change.mean()), error)

    def _curves(self, removed: Sequence[int], reach: float) -> list[Curve]:
        """What the output changes by if one block alone removes up to `reach` less or more than in a schedule."""
        centre, curves = shares(self._costs, removed), []
        still = self._few(centre)
        for layer, share in enumerate(centre):
            ends = {max(0.0, share - reach), min(0.5, share + reach)} - {share} if layer in self._costs.layers else ()
            found = {share: 0.0}
            for end in ends:
                change = self._few([end if i == layer else other for i, other in enumerate(centre)]) - still
                error = float(change.std() / math.sqrt(len(change))) if len(change) > 1 else 0.0
                found[end] = float(change.mean()) + error
            curves.append(Curve(sorted(found), [found[at] for at in sorted(found)]))
        return curves

    def _few(self, removed: Sequence[float]) -> Tensor:
        """What shares, one per block, change on the probes."""
        change = self._evaluate(self._costs.config.replace(ratio=[1 - share for share in removed]), self._probes)
        self._tick()
        return change


class _Clock:
    """Milliseconds of a batch on the device of the model.

    Raises:
        ConfigError: if the model as it is takes no more than `limit`.
    """

    def __init__(self, model: nn.Module, images: Tensor, limit: float) -> None:
        self._model, self._images, self.limit = model, images, limit
        (spent,) = self._measured([None])
        if spent <= limit:
            raise ConfigError(
                f"tune(milliseconds={limit:g}): the model as it is takes {spent:.2f} for a batch of {len(images)}, so "
                "there is nothing to remove"
            )
        self._full = spent

    def share(self, costs: Costs) -> float:
        """The share of FLOPs at which a constant ratio is about as fast as it must be."""
        settings: list[ScheduledMergeConfig] = [costs.config.replace(ratio=r) for r in (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)]
        points = [(1.0, self._full)]
        for config, spent in zip(settings, self._measured(settings), strict=True):
            points.append((costs.of(costs.removed(config)) / costs.before, spent))
        wanted = 0.98 * self.limit
        for (share, spent), (lower, faster) in itertools.pairwise(points):
            if faster <= wanted < spent:
                return lower + (share - lower) * (wanted - faster) / (spent - faster)
        raise ConfigError(
            f"tune(milliseconds={self.limit:g}): a batch of {len(self._images)} takes {points[-1][1]:.2f} where every "
            f"block removes half of its tokens with {costs.config.method}, and {self._full:.2f} as it is. Less is out "
            "of reach; a smaller batch takes less"
        )

    def timed(self, rows: Sequence[Tried]) -> list[Tried]:
        """The rows with their milliseconds."""
        spent = self._measured([row.config for row in rows])
        return [replace(row, milliseconds=each) for row, each in zip(rows, spent, strict=True)]

    def _measured(self, configs: Sequence[ScheduledMergeConfig | None]) -> list[float]:
        runs = {str(i): runner(self._model, config, self._images) for i, config in enumerate(configs)}
        times = interleaved(runs, rounds=_SAMPLES, device=self._images.device)
        return [times[name].median * 1e3 for name in runs]
