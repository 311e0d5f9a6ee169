"""Dense features of a merged backbone: a pretrained dense head runs on them unchanged.

The backbone is a real DINOv2 ViT-S/14, the head the saliency decoder that was trained on it; neither knows of merging.
`python examples/dense_features.py` prints how near the merged maps are to the full ones and draws a few;
`--small` takes seconds. Needs `pip install "vtoken[demo]"`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vtoken
from vtoken.demo.photos import load_photographs
from vtoken.demo.saliency import SaliencyViT, load_saliency_vit, normalise
from vtoken.visualize import draw_groups, draw_heat, draw_image, side_by_side

SIZE = 224
PHOTOGRAPHS = ["coffee", "chelsea", "astronaut", "rocket", "motorcycle", "camera", "coins", "clock", "retina"]


def full_map(model: SaliencyViT, images: Tensor) -> Tensor:
    """Saliency [B, S, S] of an unpatched model, as everybody computes it."""
    [dense] = model.backbone.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    return model.decoder(dense, (SIZE, SIZE))[:, 0]


def merged_map(model: SaliencyViT, images: Tensor) -> tuple[Tensor, vtoken.Trace]:
    """The same of a patched model, by either way to dense features, and the record of what merged."""
    # One way: ask timm for a map. The very call of `full_map`; vtoken spreads merged tokens over their patches.
    [dense] = model.backbone.forward_intermediates(
        images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
    )
    # The other: take the merged tokens, do with them what you like, and spread them by the record of the forward.
    with vtoken.tracing(model.backbone) as trace:
        tokens = model.backbone.forward_features(images)  # [B, fewer, 384]
    patches = vtoken.unmerge(tokens, trace)[:, trace.num_prefix :]  # [B, 256, 384]
    same = patches.transpose(1, 2).unflatten(2, trace.grid)  # [B, 384, 16, 16]
    torch.testing.assert_close(same, dense)
    return model.decoder(dense, (SIZE, SIZE))[:, 0], trace


def measure(model: SaliencyViT, images: Tensor, config: vtoken.MethodConfig) -> dict[str, Any]:
    """Correlation and mean absolute error with the full maps per photograph, [B] each, and the FLOPs factor."""
    with torch.inference_mode():
        full = full_map(model, images)
        with vtoken.applied(model.backbone, config):
            merged, trace = merged_map(model, images)
    a, b = (m.flatten(1) - m.flatten(1).mean(1, keepdim=True) for m in (full, merged))
    return {
        "corr": torch.cosine_similarity(a, b),
        "error": (merged - full).abs().mean((1, 2)),
        "factor": vtoken.report(model.backbone, config, input_size=(3, SIZE, SIZE)).flops_factor,
        "full": full,
        "merged": merged,
        "trace": trace,
    }


def table(names: list[str], found: dict[str, dict[str, Any]]) -> str:
    """Correlation and error: a line per photograph and one for their mean, a column per setting."""
    lines = [["FLOPs factor", *(f"{got['factor']:.2f}" for got in found.values())]]
    for row, name in enumerate(names):
        lines.append([name, *(f"{got['corr'][row]:.3f} {got['error'][row]:.3f}" for got in found.values())])
    lines.append(["mean", *(f"{got['corr'].mean():.3f} {got['error'].mean():.3f}" for got in found.values())])
    return "\n".join(f"{first:<12}" + "".join(f" {c:>11}" for c in rest) for first, *rest in [["", *found], *lines])


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Print the table, write the picture; returns the figures by setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.97, 0.95, 0.93, 0.9])
    parser.add_argument("--photos", type=int, default=len(PHOTOGRAPHS), help="how many photographs")
    parser.add_argument("--small", action="store_true", help="two photographs, two ratios")
    parser.add_argument("--out", type=Path, default=Path("out/dense_features.png"), help="the picture")
    args = parser.parse_args(argv)
    if args.small:
        args.ratios, args.photos = [0.95, 0.9], 2
    model = load_saliency_vit().requires_grad_(False)
    names, photographs = load_photographs(SIZE, PHOTOGRAPHS[: args.photos])
    images = normalise(photographs)
    configs = [method(ratio=ratio) for method in (vtoken.PiToMe, vtoken.ToMe) for ratio in args.ratios]
    found = {f"{type(c).__name__} {c.ratio:g}": measure(model, images, c) for c in configs}
    print("correlation with the unmerged map, mean absolute difference from it\n" + table(names, found))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    strongest = f" {min(args.ratios):g}"
    draw(photographs[0], {name: got for name, got in found.items() if name.endswith(strongest)}, args.out)
    print(f"forward_intermediates and unmerge gave the same features every time; wrote {args.out}")
    return found


def draw(photograph: Tensor, found: dict[str, dict[str, Any]], path: Path) -> None:
    """Photograph, full map, then merged map and groups of every setting; maps from 0 (blue) to 1 (yellow)."""
    full = next(iter(found.values()))["full"][0]
    pictures, captions = [draw_image(photograph), draw_heat(full, low=0, high=1)], ["photograph", "full map"]
    for name, got in found.items():
        pictures += [draw_heat(got["merged"][0], low=0, high=1), draw_groups(photograph, got["trace"])]
        captions += [f"{name}: merged map", f"groups, FLOPs / {got['factor']:.2f}"]
    side_by_side(pictures, captions).save(path)


if __name__ == "__main__":
    main()
