"""Everything that needs a GPU, in one command of at most 8 minutes; one result file, out/gpu.json.

Whole models in bfloat16, the merge step and attention with sizes on their shapes, sparse attention against flash,
masked and flex attention, and the batch from which merging pays, eager and replayed as CUDA graphs. Times lie between
CUDA events. Cases that no longer fit into the budget are skipped and listed; a case that fails is listed with its error
and the others go on. Without a GPU nothing is measured (exit code 0); `--device cpu --small` rehearses every case on
tiny shapes and marks its file as no GPU figures.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from check import Checks
from merge_step import HEAD, Shape, line, time_attention, time_step
from models import build, random_images
from options import begin, frame, parse, parser, run
from sparse_gpu import HEAD as SPARSE_HEAD
from sparse_gpu import SparseShape, sparse_line, time_sparse
from throughput import as_rows, measure, show

import vtoken
from vtoken.accounting.compare import label, runner, write_json
from vtoken.accounting.timing import interleaved
from vtoken.errors import VTokenError

Rows = list[dict[str, Any]]
RATIOS = (0.925, 0.9)
#: Model, batch, and what enters its first block.
MODELS = [
    ("vit_base_patch16_224", Shape(256, 197, 768, 12)),
    ("vit_large_patch14_clip_336", Shape(64, 577, 1024, 16)),
    ("vit_large_patch14_dinov2", Shape(32, 1370, 1024, 16)),
]
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: Batch, patch rows and columns (and one class token), heads, share of keys.
SPARSE = [
    SparseShape(batch, side, 6, ratio)
    for batch, side in ((64, 24), (32, 32), (8, 48), (4, 64))
    for ratio in (0.05, 0.1, 0.25)
]
SMALL_SPARSE = [SparseShape(1, 10, 2, 0.1)]
SMALL_MODELS = [("test_vit", Shape(2, 101, 64, 2))]


class OutOfTimeError(Exception):
    """The budget ran out inside a case."""


@dataclass(frozen=True)
class Bench:
    """What every case is given.

    Args:
        device: where to measure.
        rounds: timing samples of everything.
        deadline: on time.monotonic(); no run starts later.
        dtype: of models and inputs.
    """

    device: torch.device
    rounds: int
    deadline: float
    dtype: torch.dtype = torch.bfloat16

    def tick(self) -> None:
        """After every timed run."""
        if time.monotonic() > self.deadline:
            raise OutOfTimeError

    def model(self, name: str) -> Any:
        """A model with random weights."""
        return build(name, self.device).to(self.dtype)

    def images(self, model: Any, batch: int) -> torch.Tensor:
        """Inputs for it."""
        return random_images(model, batch, torch.empty(0, device=self.device, dtype=self.dtype))


def whole_model(bench: Bench, name: str, batch: int) -> Rows:
    """Inference of a model without and with PiToMe and ToMe, and narrowed to the same token counts."""
    model = bench.model(name)
    configs = [method(ratio=ratio) for method in (vtoken.PiToMe, vtoken.ToMe) for ratio in RATIOS]
    found, refused = measure(
        Checks(model), configs, bench.images(model, batch), rounds=bench.rounds, tick=bench.tick
    )  # fmt: skip
    show(f"{name}, batch {batch}, {bench.dtype}, {bench.device}", found, refused)
    return as_rows(found, refused, batch, model=name)


def merge_step(bench: Bench, shape: Shape) -> Rows:
    """One step against its plain form and against a block."""
    with torch.inference_mode():
        rows = [time_step(shape, bench.rounds, bench.device, bench.dtype, calls=20)]
    return _printed(rows)


def attention(bench: Bench, shape: Shape) -> Rows:
    """Fused attention with sizes against explicit softmax and against no sizes."""
    with torch.inference_mode():
        rows = time_attention(shape, bench.rounds, bench.device, bench.dtype, calls=20)
    return _printed(rows)


def sparse(bench: Bench, shape: SparseShape) -> Rows:
    """Sparse attention in every form, with and without selection, against dense, masked and flex attention."""
    rows = time_sparse(shape, bench.rounds, bench.device, bench.dtype, calls=20, tick=bench.tick)
    print(SPARSE_HEAD)
    for row in rows:
        print(sparse_line(row))
    return rows


def batch_sweep(bench: Bench, name: str, batches: Sequence[int], graph: bool) -> Rows:
    """PiToMe at ratio 0.9 against the unpatched model for every batch size, and the break-even batch."""
    model, config, rows = bench.model(name), vtoken.PiToMe(ratio=0.9), []
    checks, kind = Checks(model), "CUDA graphs" if graph else "eager"
    print(f"\n{name}, {label(config)}, {kind}: unpatched time / patched time (of minima)")
    for batch in batches:
        images = bench.images(model, batch)
        frame = {"model": name, "batch": batch, "cuda_graph": graph}
        problem = checks.problem(config, images)
        if problem is not None:
            print(f"batch {batch}: no speed-up, the check failed: {problem}")
            rows.append(frame | {"refused": problem})
            continue
        row = frame | _factor(bench, model, config, images, graph)
        print(f"batch {batch:>4} {row['milliseconds']:>8.2f} ms {row['factor']:>6.2f} ({row['factor_min']:.2f})")
        rows.append(row)
    first = break_even({row["batch"]: row["factor"] for row in rows if "factor" in row})
    print(f"break-even batch: {first or 'none of these'}")
    return [*rows, {"model": name, "cuda_graph": graph, "break_even_batch": first}]


def break_even(factors: dict[int, float]) -> int | None:
    """The smallest batch from which on, in every larger one too, the factor is above 1; None if there is none."""
    found = None
    for batch in sorted(factors, reverse=True):
        if factors[batch] <= 1.0:
            break
        found = batch
    return found


def _factor(bench: Bench, model: Any, config: vtoken.MethodConfig, images: torch.Tensor, graph: bool) -> dict[str, Any]:
    runs = {"unpatched": runner(model, None, images), "patched": runner(model, config, images)}
    if graph:
        runs = {name: _captured(run) for name, run in runs.items()}
    calls = max(1, 64 // images.shape[0]) if bench.device.type == "cuda" else 1
    times = interleaved(
        runs, rounds=bench.rounds, warmup=2, calls=calls, device=bench.device, tick=bench.tick
    )  # fmt: skip
    stock, ours = times["unpatched"], times["patched"]
    return {
        "milliseconds": ours.median * 1e3,
        "other_milliseconds": stock.median * 1e3,
        "factor": stock.median / ours.median,
        "factor_min": stock.minimum / ours.minimum,
        "samples": ours.samples,
    }


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    """The same work recorded once and replayed without launching kernel by kernel."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up, outside the stream that records, as torch asks for
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _printed(rows: Rows) -> Rows:
    print(HEAD)
    for row in rows:
        print(line(row))
    return rows


def cases(small: bool) -> list[tuple[str, Callable[[Bench], Rows]]]:
    """Every case by name, the most wanted first."""
    models, batches = (SMALL_MODELS, (1, 2)) if small else (MODELS, BATCHES)
    name = models[0][0]
    found: list[tuple[str, Callable[[Bench], Rows]]] = []
    for model, shape in models:
        found.append((f"whole model {model}", lambda b, m=model, s=shape: whole_model(b, m, s.batch)))
    for model, shape in models:
        found.append((f"merge step {model}", lambda b, s=shape: merge_step(b, s)))
        found.append((f"attention {model}", lambda b, s=shape: attention(b, s)))
    for sparse_shape in SMALL_SPARSE if small else SPARSE:
        found.append((f"sparse attention {sparse_shape.name}", lambda b, s=sparse_shape: sparse(b, s)))
    found.append((f"batch sweep {name}", lambda b: batch_sweep(b, name, batches, False)))
    if not small:
        found.append((f"batch sweep {name}, CUDA graphs", lambda b: batch_sweep(b, name, batches, True)))
    return found


def run_case(bench: Bench, name: str, case: Callable[[Bench], Rows]) -> Rows:
    """The rows of one case; one row that says so if there was no time or it failed."""
    start = time.monotonic()
    try:
        bench.tick()
        rows = case(bench)
    except OutOfTimeError:
        print(f"{name}: skipped, the time budget is used up")
        return [{"case": name, "skipped": "the time budget is used up"}]
    except (RuntimeError, AssertionError, VTokenError) as error:
        print(f"{name}: failed: {error}")
        return [{"case": name, "error": f"{type(error).__name__}: {error}"}]
    seconds = round(time.monotonic() - start, 1)
    return [row | {"case": name, "case_seconds": seconds} for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, write the file after each; 1 if a case failed or a check refused one."""
    deadline = time.monotonic()
    top = parser("gpu", __doc__, rounds=15)
    top.set_defaults(device="cuda", out=Path("out/gpu.json"))
    top.add_argument("--budget", type=float, default=420.0, help="seconds after which no further run starts")
    args = parse(top, argv, {"rounds": 2})
    if args.device != "cpu" and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees no CUDA device, so nothing was measured and nothing written")
        return 0
    if args.device == "cpu" and not args.small:
        top.error("--device cpu is a rehearsal and needs --small")
    bench = Bench(begin(args), args.rounds, deadline + args.budget)
    is_gpu = bench.device.type == "cuda"
    note = "figures of this GPU" if is_gpu else "rehearsal on a CPU with tiny shapes; these are not GPU figures"
    rows: Rows = []
    for name, case in cases(args.small):
        rows += run_case(bench, name, case)
        write_json(args.out, frame(args, bench.device) | {"gpu_figures": is_gpu, "note": note}, rows)
        if is_gpu:
            torch.cuda.empty_cache()
    print(f"\n{note}; wrote {args.out}")
    return 1 if any("error" in row or "refused" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(run(main))
