"""What a token budget for video costs and saves: allocation, resampling, prefill.

Parts: "allocation" times the exact allocation, "resampling" every way from a frame's grid to its tokens, both beside
the vision tower on the same frames; "prefill" the first pass of the language model over prompts of several budgets,
as shares of the default tokens. A LLaVA-OneVision with random weights, mid-size. Before a prefill is timed, the logits
of its prompt must equal those of one whose tokens were interpolated row by row; a budget that fails gets no ratio, and
the exit code is 1. "published" counts FLOPs of real sizes (7B answer, SigLIP tower) and times nothing: at an equal
budget QuoTA is not faster, as more frames pass the tower and the scorer comes on top.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from options import begin, parse, parser, run, write
from torch import Tensor

from vtoken.accounting.prefill import Decoder, prefill_flops
from vtoken.accounting.timing import interleaved
from vtoken.accounting.vision import Tower, tower_flops
from vtoken.ops import allocate_tokens, assign, row_widths

GRID, DEFAULT = 27, 196
MODES = ("bilinear", "pool", "merge", "stride")
QWEN2_7B = Decoder(layers=28, width=3584, mlp_width=18944, kv_width=512)
QWEN2_1_5B = Decoder(layers=28, width=1536, mlp_width=8960, kv_width=256)  # of the published scorer, Qwen2-VL-2B
SO400M, QWEN2_VL_TOWER, CLIP_L = Tower(27, 1152, 4304), Tower(32, 1280, 5120), Tower(24, 1024, 4096)


def build(args: Any, device: torch.device) -> Any:
    """A LLaVA-OneVision with a SigLIP-like tower of 27 x 27 patches, random weights."""
    import transformers

    vision = transformers.SiglipVisionConfig(
        hidden_size=args.tower_width, intermediate_size=4 * args.tower_width, num_hidden_layers=args.tower_layers,
        num_attention_heads=args.tower_width // 64, image_size=14 * GRID, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    text = transformers.Qwen2Config(
        hidden_size=args.width, intermediate_size=args.width * 11 // 4, num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64, num_key_value_heads=max(1, args.width // 256), vocab_size=512,
    )  # fmt: skip
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_id=5, video_token_id=6, vision_feature_layer=-1
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config).to(device).eval()


def scores_of(frames: int, seed: int) -> list[float]:
    """A few relevant stretches among frames that hardly matter."""
    rng = random.Random(seed)
    return [rng.betavariate(0.4, 2.0) for _ in range(frames)]


def time_parts(model: Any, args: Any, device: torch.device) -> list[dict[str, Any]]:
    """Rows of allocation and resampling, with the tower's time on as many frames."""
    pixels = torch.randn(args.tower_frames, 3, 14 * GRID, 14 * GRID, device=device)
    grids = torch.randn(args.frames, GRID, GRID, args.width, device=device)
    budget = args.frames * DEFAULT
    tokens = allocate_tokens(scores_of(args.frames, args.seed), budget, max_tokens=GRID * GRID)
    # Merging starts from the pooled grid, as published.
    side = round(DEFAULT**0.5)
    pooled = torch.stack([assign(grid, DEFAULT).tokens.view(side, side, -1) for grid in grids])
    merged = allocate_tokens(scores_of(args.frames, args.seed), budget // 2, max_tokens=DEFAULT)

    def resample(mode: str) -> None:
        counts, source = (merged, pooled) if mode == "merge" else (tokens, grids)
        for grid, count in zip(source, counts, strict=True):
            assign(grid, count, mode)

    def interpolate() -> None:
        F.interpolate(grids.permute(0, 3, 1, 2).contiguous(), size=(side, side), mode="bilinear")

    variants: dict[str, Callable[[], object]] = {"tower": lambda: model.model.vision_tower(pixels)}
    variants |= {f"allocation {n}": functools.partial(spread, n, args.seed) for n in args.allocate}
    variants |= {mode: functools.partial(resample, mode) for mode in MODES} | {"model's own": interpolate}
    times = interleaved(variants, rounds=args.rounds, device=device)
    per_frame = times["tower"].median / args.tower_frames

    def row(part: str, name: str, frames: int) -> dict[str, Any]:
        took = times[f"allocation {frames}" if part == "allocation" else name]
        tower = per_frame * frames
        return {"part": part, "name": name, "frames": frames, "seconds": took.median, "seconds_min": took.minimum,
                "tower_seconds": tower, "of_tower": took.median / tower}  # fmt: skip

    allocation = [row("allocation", "exact", n) for n in args.allocate]
    return allocation + [row("resampling", name, args.frames) for name in ("model's own", *MODES)]


def spread(frames: int, seed: int) -> list[int]:
    """An allocation as large as published: the default tokens, at most the native grid each."""
    return allocate_tokens(scores_of(frames, seed), frames * 131, max_tokens=GRID * GRID)


def row_by_row(grid: Tensor, count: int) -> Tensor:
    """The tokens of a frame from the definition: every row of its own interpolation."""
    image = grid.permute(2, 0, 1)[None].double()
    widths = row_widths(count, *grid.shape[:2])
    rows = [
        F.interpolate(image, size=(len(widths), w), mode="bilinear")[0, :, r].T.to(grid.dtype)
        for r, w in enumerate(widths)
    ]
    return torch.cat(rows) if rows else grid.flatten(0, 1)[:0]


def time_prefill(model: Any, args: Any, device: torch.device) -> list[dict[str, Any]]:
    """Rows of the prefill, all default tokens first."""
    inner, frames = model.model.language_model, args.prefill_frames
    grids = torch.randn(frames, GRID, GRID, args.width, device=device)
    text = inner.get_input_embeddings()(torch.randint(7, 512, (1, args.text), device=device))
    default, scores = frames * DEFAULT, scores_of(frames, args.seed)
    prompts: dict[float, tuple[Tensor, bool]] = {}
    for share in (1.0, *(s for s in args.shares if s != 1.0)):
        budget = int(share * default + 0.5)
        counts = allocate_tokens(scores, budget, max_tokens=GRID * GRID)
        made = [
            torch.cat([text, torch.cat([f(g, t) for g, t in zip(grids, counts, strict=True)])[None]], dim=1)
            for f in (lambda g, t: assign(g, t).tokens, row_by_row)
        ]
        ends = [model.lm_head(inner(inputs_embeds=prompt).last_hidden_state[:, -1]) for prompt in made]
        error = float((ends[0] - ends[1]).abs().max() / ends[1].abs().max())
        prompts[share] = (made[0], error < 1e-3 and made[0].shape[1] == args.text + min(budget, frames * GRID**2))
    runs = {
        f"{share:g}": functools.partial(inner, inputs_embeds=prompt, use_cache=True)
        for share, (prompt, _) in prompts.items()
    }
    times = interleaved(runs, rounds=args.rounds, device=device)
    whole = prefill_flops(model, args.text + default, causal=True)
    rows = []
    for share, (prompt, checked) in prompts.items():
        length, took = prompt.shape[1], times[f"{share:g}"]
        row = {"part": "prefill", "share": share, "tokens": length - args.text, "checked": checked,
               "gflops": prefill_flops(model, length, causal=True) / 1e9,
               "flops_ratio": prefill_flops(model, length, causal=True) / whole}  # fmt: skip
        if checked:
            row |= {"seconds": took.median, "time_ratio": took.median / times["1"].median,
                    "time_ratio_minima": took.minimum / times["1"].minimum}  # fmt: skip
        rows.append(row)
    return rows


def published() -> list[dict[str, Any]]:
    """FLOPs of real sizes: the 64-frame baseline, and QuoTA with 96 frames, three scorers, two budgets."""
    small = 256  # tokens a frame with max_pixels set
    scorers = {
        "none": 0,
        "CLIP ViT-L/14": tower_flops(CLIP_L, 257),
        f"2B LVLM, {small} tokens a frame": lvlm(small),
        "2B LVLM, 720p": lvlm(1196),
    }
    rows = [flops_row("baseline, 64 frames", 64, 12544, "none", 0)]
    for budget in (12544, 6272):
        rows += [flops_row("QuoTA, 96 frames", 96, budget, name, 96 * each) for name, each in scorers.items()]
    whole = rows[0]["total_tflops"]
    return [row | {"of_baseline": row["total_tflops"] / whole} for row in rows]


def lvlm(tokens: int) -> int:
    """FLOPs of scoring one frame with Qwen2-VL-2B: its tower sees four patches a token, its prompt 60 words of text."""
    return tower_flops(QWEN2_VL_TOWER, 4 * tokens) + prefill_flops(QWEN2_1_5B, tokens + 60, causal=True)


def flops_row(name: str, frames: int, budget: int, scorer: str, scoring: int) -> dict[str, Any]:
    """One line of the table of real sizes, in TFLOPs."""
    tower, prefill = frames * tower_flops(SO400M, 729), prefill_flops(QWEN2_7B, budget, causal=True)
    return {"part": "published", "name": name, "budget": budget, "scorer": scorer, "tower_tflops": tower / 1e12,
            "scorer_tflops": scoring / 1e12, "prefill_tflops": prefill / 1e12,
            "total_tflops": (tower + scoring + prefill) / 1e12}  # fmt: skip


def show(rows: Sequence[dict[str, Any]], args: Any, device: torch.device) -> None:
    """Three tables; no time for a budget whose check failed."""
    size = f"tower {args.tower_layers} x {args.tower_width}, language model {args.layers} x {args.width}"
    print(f"LLaVA-OneVision, {size}, {args.threads} thread(s), {device}")
    print(f"{'':<26} {'frames':>7} {'ms':>9} {'(min)':>9} {'tower ms':>9} {'of tower':>9}")
    for row in rows:
        if row["part"] in ("allocation", "resampling"):
            ms = "".join(f" {1e3 * row[key]:>9.2f}" for key in ("seconds", "seconds_min", "tower_seconds"))
            print(f"{row['part'] + ' ' + row['name']:<26} {row['frames']:>7}{ms} {row['of_tower']:>9.1e}")
    print(
        f"{'prefill at':<12} {'tokens':>7} {'GFLOPs':>9} {'FLOPs ratio':>12} {'time ratio':>11} {'(min)':>7} {'s':>7}"
    )
    for row in rows:
        if row["part"] == "prefill":
            line = f"{row['share']:<12g} {row['tokens']:>7} {row['gflops']:>9.1f} {row['flops_ratio']:>12.3f}"
            if row["checked"]:
                line += f" {row['time_ratio']:>11.3f} {row['time_ratio_minima']:>7.3f} {row['seconds']:>7.2f}"
            print(line if row["checked"] else line + "  logits differ from the prompt made row by row: no ratio")
    heads = "".join(f"{name:>9}" for name in ("scorer", "prefill", "total"))
    print(f"{'TFLOPs of real sizes':<21} {'budget':>7} {'scorer':<31} {'tower':>7}{heads} {'x':>6}")
    for row in rows:
        if row["part"] == "published":
            parts = "".join(f"{row[key]:>9.1f}" for key in ("scorer_tflops", "prefill_tflops", "total_tflops"))
            print(f"{row['name']:<21} {row['budget']:>7} {row['scorer']:<31} {row['tower_tflops']:>7.1f}{parts}"
                  f" {row['of_baseline']:>6.2f}")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, write the result file; 1 if a check failed."""
    top = parser("video", __doc__, rounds=5)
    top.add_argument("--frames", type=int, default=32, help="frames that are resampled")
    top.add_argument("--allocate", type=int, nargs="+", default=[96, 160, 1000], help="frames that are allocated")
    top.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.125], help="budgets, of the default")
    top.add_argument("--prefill-frames", type=int, default=16, help="frames in the prompt")
    top.add_argument("--text", type=int, default=60, help="text tokens in the prompt")
    top.add_argument("--width", type=int, default=512, help="of the language model, a multiple of 256")
    top.add_argument("--layers", type=int, default=4, help="of the language model")
    top.add_argument("--tower-width", type=int, default=768, help="a multiple of 64")
    top.add_argument("--tower-layers", type=int, default=12, help="of the tower")
    top.add_argument("--tower-frames", type=int, default=1, help="frames in one run of the tower")
    small = {"frames": 4, "allocate": [96], "shares": [0.25], "prefill_frames": 4, "width": 256, "layers": 2,
             "tower_width": 128, "tower_layers": 2, "rounds": 2}  # fmt: skip
    args = parse(top, argv, small)
    device = begin(args)
    with torch.inference_mode():
        model = build(args, device)
        rows = [*time_parts(model, args, device), *time_prefill(model, args, device), *published()]
    show(rows, args, device)
    write(args, device, rows)
    return 0 if all(row.get("checked", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(run(main))
