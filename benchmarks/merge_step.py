"""One merge step, and attention with token sizes, against plain forms of the same arithmetic; CPU, one thread.

Prints ratios of medians and of minima over interleaved rounds. A speed-up is only printed if both forms agree.
The plain step is what one would write from the paper, an operation per line; it lives here so that both run in one
process. Targets: performance.md section 11.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import vtoken
from vtoken.accounting.timing import interleaved


def plain_step(keys: Tensor, x: Tensor, size: Tensor, r: int, margin: float, num_prefix: int) -> tuple[Tensor, Tensor]:
    """PiToMe, one operation per line: keys [B, H, T, D], tokens [B, T, C], sizes [B, T, 1]."""
    metric = keys.mean(1)[:, num_prefix:]
    metric = metric / metric.norm(dim=-1, keepdim=True)
    similarity = metric @ metric.transpose(-1, -2)
    energy = F.elu(similarity - margin).mean(-1)
    order = energy.argsort(dim=-1, descending=True)
    kept, a, b = order[:, 2 * r :].sort(-1).values, order[:, 0 : 2 * r : 2], order[:, 1 : 2 * r : 2]
    batch = torch.arange(x.shape[0]).unsqueeze(1)
    partner = similarity[batch.unsqueeze(-1), a.unsqueeze(-1), b.unsqueeze(1)].argmax(-1)

    def merge(rows: Tensor) -> Tensor:
        width = rows.shape[-1]
        prefix, rest = rows[:, :num_prefix], rows[:, num_prefix:]
        dest = rest[batch, b].scatter_add(1, partner.unsqueeze(-1).expand(-1, -1, width), rest[batch, a])
        return torch.cat([prefix, rest[batch, kept], dest], dim=1)

    weighted, new_size = merge(x * size), merge(size)
    return weighted / new_size, new_size


def vtoken_step(
    keys: Tensor, x: Tensor, size: Tensor, r: int, margin: float, num_prefix: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same through vtoken.ops."""
    plan = vtoken.ops.plan_pitome(vtoken.ops.key_metric(keys), r, margin=margin, num_prefix=num_prefix)
    return plan.apply(x, size)


def clustered(batch: int, tokens: int, width: int, heads: int) -> tuple[Tensor, Tensor]:
    """Keys as a strided part of a fused projection, and tokens; a few clusters plus noise, as in real images."""
    centres = torch.randn(batch, 12, 3 * width)
    rows = centres[:, torch.arange(tokens) % 12] + 0.5 * torch.randn(batch, tokens, 3 * width)
    keys = rows.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)[1]
    return keys, torch.randn(batch, tokens, width)


def show(name: str, slow: Callable[[], object], fast: Callable[[], object], rounds: int, target: str) -> None:
    """One line: how much faster `fast` is."""
    times = interleaved({"slow": slow, "fast": fast}, rounds=rounds, warmup=2)
    slow_time, fast_time = times["slow"], times["fast"]
    ratio, ratio_min = slow_time.median / fast_time.median, slow_time.minimum / fast_time.minimum
    print(f"{name:<64} {ratio:>6.2f} {ratio_min:>6.2f} {fast_time.median * 1e3:>9.2f}   {target}")


def merge_steps(rounds: int, shapes: list[tuple[int, int, int, int, str]]) -> None:
    """Merge step of both forms."""
    for batch, tokens, width, heads, target in shapes:
        keys, x = clustered(batch, tokens, width, heads)
        size, r = torch.ones(batch, tokens), math.floor((tokens - 1) * 0.1 + 1e-6)
        slow, slow_size = plain_step(keys, x, size.unsqueeze(-1), r, 0.45, 1)
        fast, fast_size = vtoken_step(keys, x, size, r, 0.45, 1)
        # Sums over tokens do not depend on near-ties in the order, which differ by rounding.
        for ours, theirs in ((fast * fast_size.unsqueeze(-1), slow * slow_size), (fast_size.unsqueeze(-1), slow_size)):
            torch.testing.assert_close(ours.sum(1), theirs.sum(1), rtol=1e-3, atol=1e-2)
        show(
            f"merge step, batch {batch}, {tokens} tokens, {width} wide, r={r}",
            functools.partial(plain_step, keys, x, size.unsqueeze(-1), r, 0.45, 1),
            functools.partial(vtoken_step, keys, x, size, r, 0.45, 1),
            rounds,
            target,
        )


def attentions(rounds: int, shapes: list[tuple[int, int, int, str, str]]) -> None:
    """Fused attention with the size mask, against explicit softmax and against fused attention without a mask."""
    for batch, heads, tokens, explicit_target, mask_target in shapes:
        q, k, v = torch.randn(3, batch, tokens, heads, 64).transpose(2, 3).unbind(0)
        bias = vtoken.ops.size_bias(torch.randint(1, 5, (batch, tokens)).float(), q.dtype)

        def explicit(q: Tensor = q, k: Tensor = k, v: Tensor = v, bias: Tensor = bias) -> Tensor:
            return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias).softmax(-1) @ v

        def masked(q: Tensor = q, k: Tensor = k, v: Tensor = v, bias: Tensor = bias) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

        def unmasked(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

        torch.testing.assert_close(masked(), explicit(), rtol=1e-4, atol=1e-5)
        name = f"batch {batch}, {heads} heads, {tokens} tokens"
        show(f"fused attention with sizes against explicit, {name}", explicit, masked, rounds, explicit_target)
        show(f"the same against fused without sizes, {name}", unmasked, masked, rounds, mask_target)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41, help="samples of each form")
    parser.add_argument("--small", action="store_true", help="one shape of each, few rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = [(8, 197, 768, 12, ">= 1.3"), (8, 197, 384, 6, ">= 1.1"), (32, 197, 768, 12, ""), (2, 577, 1024, 16, ""),
             (1, 197, 768, 12, ">= 1.0"), (1, 197, 192, 3, ">= 1.0")]  # fmt: skip
    shapes = [(8, 12, 197, "", ">= 0.93"), (2, 16, 577, ">= 1.8", ">= 0.93")]
    rounds = 5 if args.small else args.rounds
    with torch.inference_mode():
        print(
            f"{'times faster than the plain form, one thread':<64} {'median':>6} {'(min)':>6} {'ours ms':>9}   target"
        )
        merge_steps(rounds, steps[:1] if args.small else steps)
        attentions(rounds, shapes[1:] if args.small else shapes)


if __name__ == "__main__":
    main()
