"""What compiling costs and gives: stock as a whole, patched as a whole, patched by `vtoken.compile`, and not at all.

Seconds of CPU of the first call, the compiler's own processes included, without caches and with one compiler thread;
then speed beside compiled stock, paired within rounds. The exit code is 1 if a target is missed.
"""

from __future__ import annotations

import functools
import random
import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from models import build, random_images
from options import begin, parse, parser, run, write
from small import METHODS, paired, time_in_rounds

import vtoken
from vtoken.accounting.shadow import shared_copy

#: By `vtoken.compile`: the most seconds, of compiling stock, and the least speed, of compiled stock.
MOST_SECONDS, LEAST_SPEED = 1.0, 1.45


def cpu_seconds() -> float:
    """Of this process and of those it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def first_call(network: Callable[..., object], images: torch.Tensor) -> float:
    """CPU seconds of a call that compiles."""
    before = cpu_seconds()
    network(images)
    return cpu_seconds() - before


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the result file; 1 if a target is missed."""
    top = parser("compile", __doc__, rounds=21)
    top.add_argument("--model", default="vit_tiny_patch16_224", help="timm name")
    top.add_argument("--batch", type=int, default=1)
    top.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    top.add_argument("--backend", default="inductor", help="of torch.compile")
    args = parse(top, argv, {"rounds": 2, "model": "test_vit", "method": ["tome"]})
    device = begin(args)
    # A cache would tell what an earlier run cost. Child processes that go on living would not be counted.
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1
    model = build(args.model, device)
    images = random_images(model, args.batch, torch.empty(0, device=device))
    compiled = functools.partial(torch.compile, fullgraph=True, backend=args.backend)
    networks: dict[str, Any] = {"stock": compiled(model)}
    eager: dict[str, Any] = {"stock, eager": model}
    for name in args.method:
        networks[f"{name}, whole model"] = compiled(vtoken.apply(shared_copy(model), METHODS[name]))
        patched = vtoken.apply(shared_copy(model), METHODS[name])
        networks[f"{name}, vtoken.compile"] = vtoken.compile(patched, backend=args.backend)
        eager[f"{name}, eager"] = vtoken.apply(shared_copy(model), METHODS[name])
    with torch.inference_mode():
        cost = {name: first_call(network, images) for name, network in networks.items()}
        cost |= dict.fromkeys(eager, 0.0)
        runs = {name: functools.partial(network, images) for name, network in (networks | eager).items()}
        seconds = time_in_rounds(runs, args.rounds, device, random.Random(args.seed))
    rows, missed = [], False
    print(
        f"{'':<28} {'compile s':>9} {'of stock':>8} {'speed x compiled stock':>22} {'x eager stock':>13} {'FLOPs x':>8}"
    )
    for name in cost:
        method = name.partition(",")[0]
        row: dict[str, Any] = {
            "model": args.model, "batch": args.batch, "name": name, "compile_seconds": cost[name],
            "of_stock": cost[name] / cost["stock"], "speedup_of_compiled": paired(seconds["stock"], seconds[name]),
            "speedup": paired(seconds["stock, eager"], seconds[name]), "samples": args.rounds,
            "flops_factor": vtoken.report(model, METHODS[method]).flops_factor if method in METHODS else 1.0,
        }  # fmt: skip
        judged = name.endswith("vtoken.compile") and not args.small and args.backend == "inductor"
        row["missed"] = judged and not (row["of_stock"] <= MOST_SECONDS and row["speedup_of_compiled"] >= LEAST_SPEED)
        missed |= row["missed"]
        rows.append(row)
        print(f"{name:<28} {row['compile_seconds']:>9.1f} {row['of_stock']:>8.2f} {row['speedup_of_compiled']:>22.3f} "
              f"{row['speedup']:>13.3f} {row['flops_factor']:>8.2f}{'   MISSED' if row['missed'] else ''}")  # fmt: skip
    write(args, device, rows)
    return int(missed)


if __name__ == "__main__":
    sys.exit(run(main))
