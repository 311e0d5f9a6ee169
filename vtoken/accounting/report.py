"""`vtoken.report`: tokens, multiply-adds and FLOPs per layer and in total, before and after a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from vtoken import checks
from vtoken.accounting.ideal import Narrowing
from vtoken.accounting.meter import Meter, Repeats
from vtoken.accounting.shadow import meta_copy
from vtoken.core.apply import Config, build_methods, enter
from vtoken.core.config import MethodConfig
from vtoken.core.counts import chosen, plan_of, removing
from vtoken.core.host import Host
from vtoken.core.method import AttentionMacs, AttentionMethod, BlockMethod, Methods
from vtoken.core.patch import PREDICTOR
from vtoken.core.spec import HostSpec, Plan
from vtoken.errors import ConfigError, ShapeError, VTokenError
from vtoken.ops import explain

#: Multiply-adds that a CPU core does in the time of one merge step of one image, whatever the model: its small
#: operations take about 0.2 ms there by torch, 0.05 by C (docs/performance.md 3.7).
STEP_MACS = {"torch": 8_000_000, "native": 2_000_000}


@dataclass(frozen=True)
class LayerCost:
    """One block, one image: tokens in and out, multiply-adds before and after, what the method itself spends of those.

    `attention` splits the attention core of a method with sparse attention: plain, sparse, predictor, up-projection.
    """

    layer: int
    tokens_in: int
    tokens_out: int
    macs_before: int
    macs_after: int
    matching_macs: int
    attention: AttentionMacs | None = None


@dataclass(frozen=True)
class Report:
    """What a model costs for one image, without and with a method.

    Matrix products and convolutions count, as in torch's FlopCounterMode; 1 multiply-add (MAC) = 2 FLOPs. Papers print
    multiply-adds as "FLOPs". `other_*` is what lies outside the blocks: patch embedding, pooling, head.

    Where the images decide how many tokens are left, tokens and costs after are the least that there can be, and
    `flops_factor` the most: what it is if every block removes as many as it may. `macs_most` is the other end.

    Args:
        macs_most: multiply-adds of the patched model if it removes nothing; None if its counts are exact.
    """

    model: str
    method: dict[str, Any]
    input_size: tuple[int, int, int]
    layers: tuple[LayerCost, ...]
    other_macs_before: int
    other_macs_after: int
    macs_most: int | None = None

    @property
    def exact(self) -> bool:
        """Whether every image costs the same; if not, see above."""
        return self.macs_most is None

    @property
    def macs_before(self) -> int:
        """Multiply-adds of the unpatched model."""
        return self.other_macs_before + sum(layer.macs_before for layer in self.layers)

    @property
    def macs_after(self) -> int:
        """Multiply-adds of the patched model, matching included."""
        return self.other_macs_after + sum(layer.macs_after for layer in self.layers)

    @property
    def matching_macs(self) -> int:
        """Multiply-adds that the method itself spends."""
        return sum(layer.matching_macs for layer in self.layers)

    @property
    def attention(self) -> AttentionMacs | None:
        """The attention cores of all blocks (papers' "MHSA" without projections); None if they stay as they were."""
        parts = [layer.attention for layer in self.layers if layer.attention is not None]
        if not parts:
            return None
        return AttentionMacs(*(sum(getattr(p, f.name) for p in parts) for f in fields(AttentionMacs)))

    @property
    def flops_before(self) -> int:
        """2 * macs_before."""
        return 2 * self.macs_before

    @property
    def flops_after(self) -> int:
        """2 * macs_after."""
        return 2 * self.macs_after

    @property
    def flops_factor(self) -> float:
        """FLOPs before / FLOPs after: the speed-up if every saved FLOP were saved time."""
        return self.flops_before / self.flops_after

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens before block 0 and after every block."""
        return (self.layers[0].tokens_in, *(layer.tokens_out for layer in self.layers))

    @property
    def note(self) -> str:
        """What the counts say against the method on this model; empty if nothing.

        Counts are no time. That a model is small says what a block that loses tokens saves beside what such a block
        spends on small operations, on a CPU core and for a single image: larger batches save more for the same.
        """
        narrowed = sum(layer.tokens_out < layer.tokens_in for layer in self.layers)
        saved = self.macs_before - self.macs_after
        if saved <= 0 and (narrowed or self.attention is not None):
            return "nothing can be won: the method spends as many multiply-adds as it saves, or more"
        step = STEP_MACS.get(explain("plan_tome", torch.empty(1, 1, 1, device="cpu")).backend, 0)
        if narrowed and saved < narrowed * step:
            return (
                f"small: a block that loses tokens saves {saved / narrowed / 1e6:.1f} MMACs an image; below about "
                f"{step / 1e6:.0f}, a single image is likely to take longer with the method than without. This is "
                "told by counts: `python -m vtoken bench` measures from which batch on time is won"
            )
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Everything, totals included, JSON-ready."""
        names = (
            "exact",
            "macs_before",
            "macs_after",
            "matching_macs",
            "flops_before",
            "flops_after",
            "flops_factor",
            "tokens",
            "note",
        )
        totals = {name: getattr(self, name) for name in names}
        return asdict(self) | totals | {"tokens": list(self.tokens), "input_size": list(self.input_size)}

    def __str__(self) -> str:
        head = f"{'layer':>7} {'tokens':>13} {'MMACs before':>13} {'after':>9} {'matching':>9}"
        name = f"{self.model} at {'x'.join(map(str, self.input_size))}, {self.method['method']}, one image"
        rows = [name, head]
        if not self.exact:
            rows.insert(1, "the images decide how many tokens are left: below is the least, if all merge that may")
        for c in self.layers:
            tokens = f"{c.tokens_in} -> {c.tokens_out}"
            macs = f"{c.macs_before / 1e6:>13.1f} {c.macs_after / 1e6:>9.1f} {c.matching_macs / 1e6:>9.2f}"
            rows.append(f"{c.layer:>7} {tokens:>13} {macs}")
        rows.append(f"{'other':>7} {'':>13} {self.other_macs_before / 1e6:>13.1f} {self.other_macs_after / 1e6:>9.1f}")
        total = f"{self.macs_before / 1e6:>13.1f} {self.macs_after / 1e6:>9.1f} {self.matching_macs / 1e6:>9.2f}"
        rows.append(f"{'total':>7} {'':>13} {total}")
        rows.append(
            f"FLOPs {self.flops_before / 1e9:.2f} G -> {self.flops_after / 1e9:.2f} G, factor {self.flops_factor:.2f}"
        )
        if self.macs_most is not None:
            more = 100 * (self.macs_most / self.macs_before - 1)
            rows.append(
                f"an image of which nothing merges costs {self.macs_most / 5e8:.2f} GFLOPs, {more:.1f} % more than "
                "without the method: its tokens are compared in vain"
            )
        if self.attention is not None:
            a = self.attention
            rows.append(
                f"attention core {a.dense / 1e6:.1f} MMACs -> {a.core / 1e6:.1f}, predictor {a.predictor / 1e6:.1f} + "
                f"{a.up / 1e6:.1f} (up-projection); projections not included"
            )
        if self.note:
            rows.append(self.note)
        return "\n".join(rows)


def report(
    model: nn.Module,
    config: Config | None = None,
    *,
    input_size: tuple[int, int, int] | None = None,
    **options: Any,
) -> Report:
    """Count what `config` saves on `model`, on the meta device: no weight is read and the model is not changed.

    Where the images decide how many tokens are left, the report holds bounds; see `Report`.

    Args:
        model: a supported model, patched or not.
        config: settings or a method's name (settings as `options`); None means those that are applied.
        input_size: channels, height, width of one image; None means the model's own.

    Raises:
        UnsupportedModelError, ConfigError: as `vtoken.apply`.
        ShapeError: if the model does not take images of that size.
        Exception: whatever the method itself raises on such an image.

    Example:
        >>> import timm, vtoken
        >>> cost = vtoken.report(timm.create_model("deit_tiny_patch16_224"), vtoken.PiToMe(ratio=0.9))
        >>> cost.tokens[0], cost.tokens[-1], round(cost.flops_factor, 2)
        (197, 60, 1.76)
    """
    host, configs, methods = chosen(model, config, options)
    configs = tuple(c for c in configs if c.part == "tower")
    if not configs:
        raise ConfigError("no method acts in the tower; vtoken.prompt_report counts what one in the prompt saves")
    size = image_shape(input_size) if input_size is not None else (host.adapter.channels(model), *host.image_size())
    return costs(host, configs, methods, size, plan_of(host, methods, size[1:]))


def costs(
    host: Host,
    configs: tuple[MethodConfig, ...],
    methods: Methods,
    size: tuple[int, int, int],
    counts: Plan,
) -> Report:
    """`report` for the given counts: those that `plan` gives, or those that images gave where they decide.

    Args:
        host, configs, methods: as `vtoken.core.counts.chosen` gives them, without settings of the prompt.
        size: channels, height, width of one image.
    """
    tokens, model = counts.least, host.model
    shadow = host.of(meta_copy(model))
    repeats = Repeats()
    try:
        before = _count(shadow, size, repeats)
    except VTokenError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ShapeError(f"{type(model).__name__} does not take images of {size}: {error}") from error
    # Kept keys are data, which a counter of shapes cannot see: attention cores are counted dense, then exchanged.
    # The model takes the images, so whatever is raised now is the method's own.
    spec, method, counted = host.spec, removing(methods), tuple(c.counted() for c in configs)
    entered = dict(methods if counted == configs else build_methods(shadow, counted))
    matching, unseen = _matching_macs(method, spec, tokens), [0] * spec.depth
    if not method.exact:  # there are no images here that could decide anything
        entered[BlockMethod], unseen = Narrowing(counts.removed, method.insert), matching
    enter(shadow, counted, entered)
    after = _count(shadow, size, repeats)
    cores = _attention_macs(host, methods, tokens)
    layers = tuple(
        LayerCost(
            layer=i,
            tokens_in=tokens[i],
            tokens_out=tokens[i + 1],
            macs_before=before[1][i] // 2,
            macs_after=after[1][i] // 2 + unseen[i] + _exchanged(cores[i]),
            matching_macs=matching[i],
            attention=cores[i],
        )
        for i in range(spec.depth)
    )
    described = configs[0].to_dict() if len(configs) == 1 else {"method": "+".join(c.method for c in configs)}
    most = None
    if not counts.exact:
        full = [_exchanged(core) for core in _attention_macs(host, methods, counts.tokens)]
        most = (before[0] + sum(before[1])) // 2 + sum(full) + sum(_matching_macs(method, spec, counts.tokens))
    return Report(type(model).__name__, described, size, layers, before[0] // 2, after[0] // 2, most)


def count_macs(shadow: Host, size: tuple[int, int, int]) -> int:
    """Multiply-adds of one image of `size` (channels, height, width) through a model on the meta device."""
    other, blocks = _count(shadow, size, Repeats())
    return (other + sum(blocks)) // 2


def image_shape(size: Sequence[int]) -> tuple[int, int, int]:
    """(channels, height, width) of one image; raises ShapeError for anything else."""
    shape = checks.whole_numbers(size) if isinstance(size, Sequence) else None
    if shape is None or len(shape) != 3 or min(shape) < 1:
        raise ShapeError(f"input_size is (channels, height, width) of one image, got {size!r}")
    return shape[0], shape[1], shape[2]


def _matching_macs(method: BlockMethod, spec: HostSpec, tokens: Sequence[int]) -> list[int]:
    """Multiply-adds that each block spends on choosing among its tokens."""
    return [method.matching_macs(i, tokens[i] - spec.num_prefix, spec.head_dim, spec.width) for i in range(spec.depth)]


def _attention_macs(host: Host, methods: Methods, tokens: Sequence[int]) -> list[AttentionMacs | None]:
    """Per block, what sparse attention makes of its core, with the model's own learned parts where it carries them."""
    spec, attention = host.spec, methods.get(AttentionMethod)
    if attention is None:
        return [None] * spec.depth
    predictors = {
        m.__dict__["_vtoken_index"]: m.get_submodule(PREDICTOR)
        for m in host.model.modules()
        if "_vtoken_method" in m.__dict__
    }
    return [attention.macs(i, tokens[i], tokens[0], spec, predictors.get(i)) for i in range(spec.depth)]


def _exchanged(core: AttentionMacs | None) -> int:
    return 0 if core is None else core.core + core.predictor + core.up - core.dense


def _count(
    host: Host, size: tuple[int, int, int], repeats: Repeats
) -> tuple[int, list[int]]:  # fmt: skip
    """FLOPs outside the blocks and of every block, counted while a model on the meta device runs one image."""
    shadow = host.model
    dtype = next((p.dtype for p in shadow.parameters() if p.is_floating_point()), torch.float32)
    image = torch.empty(1, *size, device="meta", dtype=dtype)
    blocks = [block for _, block in host.adapter.blocks(shadow)]
    # With gradients where torch would else take a path through its attention that no counter sees.
    gradients = any(isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) for m in shadow.modules())
    shadow.requires_grad_(gradients)
    meter = Meter(repeats)
    with meter.apart(blocks) as spent, meter, torch.set_grad_enabled(gradients):
        host.adapter.run_image(shadow, image)
    return meter.total - sum(spent), spent
