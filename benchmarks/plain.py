"""The merge step as one would write it from the paper, an operation per line: what the fast one is held against.

It shares no code with vtoken.ops. `Plain` puts it into a whole model, `clustered` makes inputs for a single step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken.core.config import MethodConfig
from vtoken.core.method import BlockMethod
from vtoken.core.slots import Slot
from vtoken.methods.merging.base import Merging
from vtoken.methods.merging.baselines import ToMe
from vtoken.methods.merging.pitome import PiToMe


class Rows(NamedTuple):
    """Which tokens merge, counted without the prefix: kept rows, sources, destinations, and each source's partner
    among the destinations, all [B, n]."""

    kept: Tensor
    sources: Tensor
    destinations: Tensor
    partner: Tensor


def unit_rows(metric: Tensor, num_prefix: int) -> Tensor:
    """The mergeable rows of a metric [B, T, d], of length 1."""
    metric = metric[:, num_prefix:]
    return metric / metric.norm(dim=-1, keepdim=True)


def pitome_rows(metric: Tensor, r: int, margin: float, num_prefix: int) -> Rows:
    """PiToMe's matching (docs/methods/pitome.md 2): the 2r tokens of highest energy pair up alternately."""
    metric = unit_rows(metric, num_prefix)
    similarity = metric @ metric.transpose(-1, -2)
    energy = F.elu(similarity - margin).mean(-1)
    order = energy.argsort(dim=-1, descending=True)
    kept, a, b = order[:, 2 * r :].sort(-1).values, order[:, 0 : 2 * r : 2], order[:, 1 : 2 * r : 2]
    batch = torch.arange(metric.shape[0], device=metric.device)
    partner = similarity[batch[:, None, None], a.unsqueeze(-1), b.unsqueeze(1)].argmax(-1)
    return Rows(kept, a, b, partner)


def tome_rows(metric: Tensor, r: int, num_prefix: int) -> Rows:
    """ToMe's matching (docs/methods/baselines.md 1): even rows of all propose to odd ones, the r best pairs merge."""
    metric = unit_rows(metric, num_prefix)
    first = num_prefix % 2
    even = torch.arange(first, metric.shape[1], 2, device=metric.device)
    odd = torch.arange(1 - first, metric.shape[1], 2, device=metric.device)
    best, partner = (metric[:, even] @ metric[:, odd].transpose(-1, -2)).max(-1)
    order = best.argsort(dim=-1, descending=True)
    kept = even[order[:, r:]].sort(-1).values
    return Rows(kept, even[order[:, :r]], odd.expand(metric.shape[0], -1), partner.gather(1, order[:, :r]))


def merge(x: Tensor, rows: Rows, num_prefix: int) -> Tensor:
    """Sums over the groups of x [B, T, C]: prefix, kept rows, destinations with their sources added."""
    batch = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    prefix, rest = x[:, :num_prefix], x[:, num_prefix:]
    index = rows.partner.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    dest = rest[batch, rows.destinations].scatter_add(1, index, rest[batch, rows.sources])
    return torch.cat([prefix, rest[batch, rows.kept], dest], dim=1)


def plain_step(keys: Tensor, x: Tensor, size: Tensor, r: int, margin: float, num_prefix: int) -> tuple[Tensor, Tensor]:
    """One PiToMe step: keys [B, H, T, D], tokens [B, T, C], sizes [B, T, 1] -> merged tokens and sizes."""
    rows = pitome_rows(keys.mean(1), r, margin, num_prefix)
    new_size = merge(size, rows, num_prefix)
    return merge(x * size, rows, num_prefix) / new_size, new_size


@dataclass(frozen=True, kw_only=True)
class Plain(MethodConfig):
    """`of`, a PiToMe or ToMe with its default settings, computed plainly and without saving anything.

    No row is ever removed: after each merge all rows of a group hold the group's mean. That is what proportional
    attention and weighted pooling stand for, so in exact arithmetic the model gives the merged model's output while
    it uses neither sizes, masks nor fewer rows. Not for rotary positions, which would tell the rows of a group apart.
    """

    of: PiToMe | ToMe

    def build(self, depth: int) -> BlockMethod:
        """The plain merging of a model with `depth` blocks."""
        return _PlainMerging(self.of, depth)


class _PlainMerging(Merging):
    def on_block(self, layer: int, x: Tensor, metric: Tensor, slot: Slot, num_prefix: int) -> tuple[Tensor, Slot]:
        batch, num_rows, _ = x.shape
        numbers = torch.arange(num_rows, device=x.device).expand(batch, -1)
        group = numbers if slot.dest is None else slot.dest  # of every row
        num_groups = int(group.max()) + 1
        size = torch.zeros(batch, num_groups, dtype=x.dtype, device=x.device).scatter_add(
            1, group, torch.ones_like(x[..., 0])
        )
        member = torch.zeros(batch, num_groups, dtype=torch.int64, device=x.device).scatter(1, group, numbers)
        tokens, metric = _take(x, member), _take(metric, member)
        r = self.num_removed(layer, num_groups - num_prefix)
        if isinstance(self.config, PiToMe):
            rows = pitome_rows(metric, r, 0.9 * (1 - layer / self.depth), num_prefix)
        else:
            rows = tome_rows(metric, r, num_prefix)
        size = size.unsqueeze(-1)
        merged = merge(tokens * size, rows, num_prefix) / merge(size, rows, num_prefix)
        group = new_numbers(rows, num_prefix, num_groups).gather(1, group)
        return _take(merged, group), replace(slot, dest=group)


def plain_form(config: MethodConfig) -> Plain | None:
    """The same settings computed plainly; None for methods and settings that have no plain form here."""
    if isinstance(config, (PiToMe, ToMe)) and config == type(config)(
        ratio=config.ratio, r=config.r, layers=config.layers
    ):
        return Plain(of=config)
    return None


def new_numbers(rows: Rows, num_prefix: int, num_tokens: int) -> Tensor:
    """Row of `merge`'s output that every token went to, [B, T]."""
    batch, num_kept = rows.kept.shape
    device = rows.kept.device
    found = torch.arange(num_tokens, device=device).repeat(batch, 1)  # right for the prefix
    kept = torch.arange(num_prefix, num_prefix + num_kept, device=device).expand(batch, -1)
    dest = torch.arange(rows.destinations.shape[1], device=device).expand(batch, -1) + num_prefix + num_kept
    found.scatter_(1, rows.kept + num_prefix, kept)
    found.scatter_(1, rows.destinations + num_prefix, dest)
    return found.scatter_(1, rows.sources + num_prefix, rows.partner + num_prefix + num_kept)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def clustered(
    batch: int, tokens: int, width: int, heads: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Keys as a strided part of a fused projection, and tokens; a few clusters plus noise, as in real images."""
    centres = torch.randn(batch, 12, 3 * width, device=device)
    rows = centres[:, torch.arange(tokens) % 12] + 0.5 * torch.randn(batch, tokens, 3 * width, device=device)
    keys = rows.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)[1]
    return keys, torch.randn(batch, tokens, width, device=device)
