"""What methods save on models, counted and not timed: tokens, multiply-adds, FLOPs factor, the matching's share.

Models are built without weights. For plain ViTs whose cost the specification lists (docs/methods/pitome.md 12, the
counts behind the
papers' tables), its value stands beside ours; exit code 1 if they differ by more than 1 %.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from models import NAMES, build, input_size
from options import begin, parse, parser, run, write
from torch import nn

import vtoken
from vtoken.accounting.compare import label
from vtoken.cli.settings import add_sweep, sweep
from vtoken.core.config import MethodConfig
from vtoken.core.host import find_adapter
from vtoken.core.spec import HostSpec

MODELS = [
    "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_base_patch16_384",
    "vit_large_patch16_224", "vit_large_patch16_384", "vit_huge_patch14_clip_224", "vit_large_patch14_dinov2",
    "open_clip:ViT-B-32", "open_clip:ViT-L-14-336",
]  # fmt: skip

# docs/methods/pitome.md 12: multiply-adds in G without matching, by (depth, width, patches per side, patch size).
_RATIOS = (1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.8)
_BY_RATIO = {
    (12, 192, 14, 16): (1.25, 1.09, 0.93, 0.81, 0.70, 0.62, 0.54, 0.43),
    (12, 384, 14, 16): (4.60, 4.01, 3.44, 2.99, 2.59, 2.29, 1.99, 1.59),
    (12, 768, 14, 16): (17.56, 15.34, 13.19, 11.49, 9.97, 8.78, 7.64, 6.06),
    (12, 768, 24, 16): (55.48, 47.38, 40.60, 34.98, 30.42, 26.49, 23.38, 18.41),
    (24, 1024, 14, 16): (61.55, 47.43, 36.20, 28.65, 23.06, 19.07, 15.80, 11.84),
    (24, 1024, 24, 16): (191.07, 141.76, 107.59, 84.09, 67.45, 55.34, 46.60, 34.52),
    (32, 1280, 16, 14): (167.30, 117.77, 83.78, 62.58, 49.18, 39.81, 33.41, 24.40),
    (24, 1024, 24, 14): (190.96, 141.65, 107.48, 83.98, 67.34, 55.23, 46.49, 34.41),
}
_TOME_BY_R = {
    (12, 384, 14, 16): {8: 3.42, 13: 2.70, 16: 2.29},
    (12, 768, 14, 16): {8: 13.10, 13: 10.37, 16: 8.77},
    (24, 1024, 14, 16): {8: 30.96},
    (24, 1024, 24, 16): {23: 96.24},
    (32, 1280, 16, 14): {7: 92.83},
}
#: The table gives two decimals, which for the smallest model is 1 %.
TOLERANCE = 0.01


def listed_gmacs(spec: HostSpec, patch: int, config: MethodConfig) -> float | None:
    """What docs/methods/pitome.md 12 lists for a plain ViT of this shape; None if nothing."""
    shape = (spec.depth, spec.width, spec.grid[0], patch)
    ratio, r, layers = (getattr(config, name, None) for name in ("ratio", "r", "layers"))
    usual = layers is None and getattr(config, "place", "") == "between"
    if not usual or spec.num_prefix != 1 or spec.grid[0] != spec.grid[1]:
        return None
    if ratio in _RATIOS and shape in _BY_RATIO:
        return _BY_RATIO[shape][_RATIOS.index(ratio)]
    return _TOME_BY_R.get(shape, {}).get(r) if isinstance(r, int) else None


def has_plain_mlp(model: nn.Module, width: int) -> bool:
    """Whether the blocks' MLP widens four times without a gate, as the listed costs assume."""
    shapes = {(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)}
    return (width, 4 * width) in shapes and (4 * width, width) in shapes


def measure(name: str, model: Any, config: MethodConfig) -> dict[str, Any]:
    """One row: a model and a setting."""
    size = input_size(model)
    cost = vtoken.report(model, config, input_size=size)
    spec = find_adapter(model).spec(model)
    plain = has_plain_mlp(model, spec.width)
    listed = listed_gmacs(spec, size[1] // spec.grid[0], config) if plain else None
    without_matching = (cost.macs_after - cost.matching_macs) / 1e9
    return {
        "model": name,
        "name": label(config),
        "method": config.to_dict(),
        "input_size": size,
        "tokens": cost.tokens,
        "gmacs_before": cost.macs_before / 1e9,
        "gmacs": cost.macs_after / 1e9,
        "flops_factor": cost.flops_factor,
        "matching_share": cost.matching_macs / cost.macs_after,
        "gmacs_without_matching": without_matching,
        "listed_gmacs": listed,
        "difference_from_listed": None if listed is None else without_matching / listed - 1,
    }


def agrees(row: dict[str, Any]) -> bool:
    """Whether a row is within rounding of its listed value, if it has one; two decimals are 0.005 off at most."""
    listed = row["listed_gmacs"]
    return listed is None or abs(row["gmacs_without_matching"] - listed) <= max(TOLERANCE * listed, 0.0051)


HEAD = (
    f"{'':<26} {'tokens':>11} {'GMACs':>7} {'after':>7} {'FLOPs x':>7} {'matching':>8}   {'unmatched':>9} {'listed':>7}"
)


def line(row: dict[str, Any]) -> str:
    """A row as text, under `HEAD`."""
    tokens = f"{row['tokens'][0]} -> {row['tokens'][-1]}"
    cells = f"{row['gmacs_before']:>7.2f} {row['gmacs']:>7.2f} {row['flops_factor']:>7.2f}"
    listed = "" if row["listed_gmacs"] is None else f"{row['gmacs_without_matching']:>9.2f} {row['listed_gmacs']:>7.2f}"
    text = f"  {row['name']:<24} {tokens:>11} {cells} {row['matching_share'] * 100:>6.2f} %   {listed}"
    return text.rstrip() + ("" if agrees(row) else "   DIFFERS")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the result file; 1 if a count differs from its listed value."""
    top = parser("flops", __doc__)
    top.add_argument("--model", nargs="+", default=MODELS, help=NAMES)
    top.add_argument("--img-size", type=int, help="side of the input in pixels, for timm models")
    add_sweep(top, ["pitome", "tome"], [0.95, 0.925, 0.9])
    args = parse(top, argv, {"model": MODELS[:1], "ratio": [0.9]})
    configs = sweep(args)
    device = begin(args)
    rows = []
    for name in args.model:
        model = build(name, img_size=args.img_size)
        print(f"{name} at {'x'.join(map(str, input_size(model)))}, one image\n{HEAD}")
        for config in configs:
            rows.append(measure(name, model, config))
            print(line(rows[-1]))
    print("unmatched: GMACs after, without the matching, as docs/methods/pitome.md 12 lists them")
    write(args, device, rows)
    wrong = [row for row in rows if not agrees(row)]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run(main))
