"""Train the small ViT for cluttered Fashion-MNIST that the repository ships; half an hour of one core with AMX.

    python examples/train_cluttered.py                  # what made examples/weights/cluttered_vit.safetensors
    python examples/train_cluttered.py --small --out tiny.safetensors           # seconds, learns nothing

Whole canvases are dear, and on them a garment is hard to find at first. So most of the images come on small canvases,
laid on a random part of the position table, and only the rest at full size.
"""

from __future__ import annotations

import argparse
import datetime
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vtoken.demo.clutter import (
    DATA,
    PATCH,
    SIDE,
    WEIGHTS,
    clutter_vit,
    draw_layout,
    load_test_canvases,
    paint,
    read_fashion_mnist,
)
from vtoken.errors import VTokenError

# Side of the canvas in patches, and the share of all images that come at that size.
STAGES = ((6, 0.5), (9, 0.2), (SIDE // PATCH, 0.3))
BATCH = 64
MUON_RATE, ADAMW_RATE, WARM_UP = 0.004, 0.002, 0.02


def logits(model: VisionTransformer, canvases: Tensor, corner: tuple[int, int]) -> Tensor:
    """Class scores [B, 10]; a canvas smaller than the model's takes the positions from `corner` (in patches) on."""
    grid, (top, left) = canvases.shape[-1] // PATCH, corner
    patches = model.patch_embed.proj(canvases).flatten(2).transpose(1, 2)
    prefix, table = model.pos_embed[:, :1], model.pos_embed[:, 1:].unflatten(1, model.patch_embed.grid_size)
    positions = table[:, top : top + grid, left : left + grid].flatten(1, 2)
    tokens = torch.cat([(model.cls_token + prefix).expand(len(patches), -1, -1), patches + positions], dim=1)
    return model.forward_head(model.norm(model.blocks(tokens)))


def optimisers(model: VisionTransformer) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=ADAMW_RATE, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def accuracy(model: VisionTransformer, canvases: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    model.eval()
    with torch.inference_mode():
        hits = [
            model(part).argmax(-1) == label for part, label in zip(canvases.split(100), labels.split(100), strict=True)
        ]
    model.train()
    return float(torch.cat(hits).float().mean())


def train(images: Tensor, labels: Tensor, total: int, seed: int) -> VisionTransformer:
    """A model that saw `total` canvases."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = clutter_vit().train()
    for block in model.blocks:
        # The backward pass of fused attention is slow on the CPU: with it a step takes 1.6 times as long.
        block.attn.fused_attn = False
    opts = optimisers(model)
    rates = [opt.param_groups[0]["lr"] for opt in opts]
    sizes = [grid for grid, share in STAGES for _ in range(math.ceil(total * share / BATCH))]
    epochs = math.ceil(len(sizes) * BATCH / len(images))
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])
    start, seen_loss, seen_hits = time.time(), 0.0, 0.0
    for step, (grid, chosen) in enumerate(zip(sizes, order.split(BATCH), strict=False)):
        scale = min(step / (WARM_UP * len(sizes)), 1 - step / len(sizes))  # up, then down to zero in a straight line
        for opt, rate in zip(opts, rates, strict=True):
            opt.param_groups[0]["lr"] = rate * scale
        canvases = paint(images, draw_layout(chosen, len(images), generator, side=grid * PATCH))
        top, left = torch.randint(SIDE // PATCH - grid + 1, (2,), generator=generator).tolist()
        with torch.autocast("cpu", torch.bfloat16):
            scores = logits(model, canvases, (top, left)).float()
        loss = F.cross_entropy(scores, labels[chosen], label_smoothing=0.05)
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        weight = 1 / min(step + 1, 50)
        seen_loss += weight * (loss.item() - seen_loss)
        seen_hits += weight * ((scores.argmax(-1) == labels[chosen]).float().mean().item() - seen_hits)
        if step % 50 == 49 or step == len(sizes) - 1:
            print(f"{step + 1}/{len(sizes)} grid {grid} loss {seen_loss:.3f} right {seen_hits:.3f} "
                  f"{time.time() - start:.0f} s", flush=True)  # fmt: skip
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure on test canvases, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=5, help="times that the 60 000 training garments are seen")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the Fashion-MNIST files")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a step per stage, to see that it runs")
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    start = time.time()
    try:
        images, labels = read_fashion_mnist("train", args.data)
        canvases, answers = load_test_canvases(50 if args.small else 5000, seed=0, folder=args.data)
    except VTokenError as error:
        print(error, file=sys.stderr)
        return 2
    model = train(images, labels, BATCH if args.small else int(args.epochs * len(images)), args.seed)
    right = accuracy(model, canvases, answers)
    minutes = (time.time() - start) / 60
    print(f"top-1 {right:.4f} on {len(answers)} test canvases, {minutes:.1f} minutes")
    about = {
        "command": shlex.join(["python", "examples/train_cluttered.py", *arguments]),
        "accuracy": f"{right:.4f}",
        "test": f"load_test_canvases({len(answers)}, seed=0)",
        "minutes": f"{minutes:.1f}",
        "date": datetime.date.today().isoformat(),
        "versions": f"torch {torch.__version__}, timm {timm.__version__}",
    }
    state = {name: v.half() if v.is_floating_point() else v for name, v in model.state_dict().items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, args.out, metadata=about)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
