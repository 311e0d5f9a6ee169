"""Which patches the class token looks at: kept patches over photographs, as VTC-CLS chooses them.

The tower is a real DINOv2 ViT-S/14 that was fine-tuned for saliency. The fine-tuning never used its class token, which
is therefore damaged: the pictures show how the choice works, not how well a CLIP tower would choose.
`python examples/kept_patches.py` draws them, `--photo chelsea coffee` others. Needs `pip install "vtoken[demo]"`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

import vtoken
from vtoken.demo.photos import load_photographs
from vtoken.demo.saliency import load_saliency_vit, normalise
from vtoken.visualize import draw_image, draw_kept, side_by_side

SIZE, GRID = 224, (16, 16)


def main(argv: Sequence[str] | None = None) -> dict[tuple[str, int], Tensor]:
    """Write the picture, one row of one photograph; returns the kept patches by photograph and budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photo", default="astronaut", help="which photograph")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 64, 32], help="patches kept of 256")
    parser.add_argument("--out", type=Path, default=Path("out/kept_patches.png"), help="the picture")
    args = parser.parse_args(argv)
    [name], photographs = load_photographs(SIZE, [args.photo])
    scores = vtoken.cls_attention_scores(load_saliency_vit(SIZE).backbone, normalise(photographs))[0]
    found, pictures, captions = {}, [draw_image(photographs[0])], [name]
    pictures.append(draw_kept(photographs[0], scores > -1, GRID, scores=scores.clamp(max=float(scores.quantile(0.98)))))
    captions.append("class attention")
    for budget in args.tokens:
        kept = vtoken.select_tokens(scores, budget)
        found[name, budget] = kept
        pictures.append(draw_kept(photographs[0], kept, GRID))
        captions.append(f"{budget} of 256 kept")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(pictures, captions).save(args.out)
    print(f"wrote {args.out}")
    return found


if __name__ == "__main__":
    main()
