"""Train Sparsifiner on the shipped ViT for cluttered Fashion-MNIST: predictors first, then the backbone under masks.

    python examples/train_sparsifiner.py                     # three seeds, what the README reports
    python examples/train_sparsifiner.py --small             # seconds, to see that it runs

Accuracy on test canvases at several keep ratios, beside the dense model and beside a control whose masks are random, of
the same density, and whose backbone was fine-tuned just as long. One model serves all ratios: every step of the second
phase draws one of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import vtoken
from vtoken.demo.clutter import DATA, draw_layout, load_clutter_vit, load_test_canvases, paint, read_fashion_mnist
from vtoken.train import (
    Teacher,
    TeacherOutput,
    fine_tuning_loss,
    parameter_groups,
    reconstruction_loss,
    set_phase,
)

RATIOS = (1.0, 0.5, 0.25, 0.1, 0.05)


def batches(images: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless training canvases and labels."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(images), (size,), generator=generator)
        yield paint(images, draw_layout(chosen, len(images), generator)), labels[chosen]


def optimiser(model: nn.Module, rate: float, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW on what learns now, with a short warm-up and a cosine."""
    opt = torch.optim.AdamW(parameter_groups(model), lr=rate)
    warm = max(1, steps // 20)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps, eta_min=rate / 20)
    up = torch.optim.lr_scheduler.LinearLR(opt, 0.05, total_iters=warm)
    return opt, torch.optim.lr_scheduler.ChainedScheduler([up, cosine], optimizer=opt)


def learn_predictors(model: nn.Module, data: Iterator[tuple[Tensor, Tensor]], steps: int, rate: float) -> float:
    """Phase 1: attention runs dense, the predictors learn to reconstruct it; returns the last losses' mean."""
    set_phase(model, "recon")
    model.eval()  # the backbone is the teacher: no batch statistics may move
    opt, schedule = optimiser(model, rate, steps)
    last: list[float] = []
    for _ in tqdm(range(steps), desc="predictors", leave=False):
        with vtoken.tracing(model, maps=("scores", "attention")) as record, torch.autocast("cpu", torch.bfloat16):
            model(next(data)[0])
        maps = [(a.scores, a.attention) for a in record.attention if a.scores is not None and a.attention is not None]
        loss = reconstruction_loss([s for s, _ in maps], [a for _, a in maps])
        loss.backward()
        opt.step()
        schedule.step()
        opt.zero_grad()
        last = [*last[-19:], loss.item()]
    return statistics.mean(last)


def fine_tune(
    model: Any, teacher: Teacher, data: Iterator[tuple[Tensor, Tensor]], steps: int, rate: float, seed: int
) -> None:
    """Phase 2: the backbone learns under live masks, held to the teacher's logits and tokens."""
    set_phase(model, "sparse")
    generator = torch.Generator().manual_seed(seed)
    opt, schedule = optimiser(model, rate, steps)
    model.eval()  # there is no dropout; batch norm keeps its statistics
    for _ in tqdm(range(steps), desc="backbone", leave=False):
        canvases, labels = next(data)
        ratio = RATIOS[1 + int(torch.randint(len(RATIOS) - 1, (), generator=generator))]
        vtoken.configure(model, keep_ratio=ratio)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.forward_features(canvases)
            logits = model.forward_head(features).float()
            target = teacher(canvases)
        target = TeacherOutput(target.logits.float(), target.tokens.float())
        classification = F.cross_entropy(logits, labels, label_smoothing=0.1)
        loss = fine_tuning_loss(classification, logits, features[:, 1:].float(), target)
        loss.backward()
        opt.step()
        schedule.step()
        opt.zero_grad()


@torch.inference_mode()
def accuracy(model: nn.Module, canvases: Tensor, labels: Tensor) -> float:
    """Share of right answers in per cent."""
    hits = [model(part).argmax(-1) == label for part, label in zip(canvases.split(50), labels.split(50), strict=True)]
    return 100 * float(torch.cat(hits).float().mean())


def one_seed(args: argparse.Namespace, seed: int, images: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Accuracy of both models at all ratios, and of the dense one."""
    canvases, answers = load_test_canvases(args.test, seed=seed, folder=args.data)
    dense = load_clutter_vit(args.weights)
    teacher = Teacher(dense)
    found = {"dense": [accuracy(dense, canvases, answers)] * len(RATIOS)}
    for name, mode in (("learned", "exact"), ("random", "random")):
        model: Any = load_clutter_vit(args.weights)
        # At 197 tokens and 32 channels per head the whole matrix is the fastest on a CPU, forward and backward.
        vtoken.apply(model, vtoken.Sparsifiner(mode=mode, seed=seed, backend="dense_masked"))
        if mode == "exact":
            loss = learn_predictors(model, batches(images, labels, args.batch, seed), args.recon_steps, args.recon_rate)
            print(f"seed {seed}: reconstruction loss {loss:.4f} after {args.recon_steps} steps")
            found["learned, not fine-tuned"] = sweep(model, canvases, answers)
        fine_tune(
            model, teacher, batches(images, labels, args.batch, seed + 100), args.tune_steps, args.tune_rate, seed
        )
        found[name] = sweep(model, canvases, answers)
        if mode == "exact" and args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            save_file(dict(model.state_dict()), args.out / f"sparsifiner_{seed}.safetensors")
    return found


def sweep(model: nn.Module, canvases: Tensor, answers: Tensor) -> list[float]:
    """Accuracy at every keep ratio."""
    found = []
    for ratio in RATIOS:
        vtoken.configure(model, keep_ratio=ratio, phase="sparse")
        found.append(accuracy(model, canvases, answers))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recon-steps", type=int, default=200)
    parser.add_argument("--tune-steps", type=int, default=80)
    parser.add_argument("--recon-rate", type=float, default=1e-2)
    parser.add_argument("--tune-rate", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--test", type=int, default=600, help="test canvases of every seed")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the Fashion-MNIST files")
    parser.add_argument("--weights", type=Path, help="the dense model; default: the one in the repository")
    parser.add_argument("--out", type=Path, help="folder for checkpoints and results")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="two steps of everything")
    args = parser.parse_args(argv)
    if args.small:
        args.seeds, args.recon_steps, args.tune_steps, args.batch, args.test = 1, 2, 2, 4, 50
    torch.set_num_threads(args.threads)
    start = time.time()
    try:
        images, labels = read_fashion_mnist("train", args.data)
        runs = [one_seed(args, seed, images, labels) for seed in range(args.seeds)]
    except vtoken.VTokenError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"top-1 in per cent by keep ratio, mean over {args.seeds} seed(s) (lowest-highest), {args.test} canvases each"
    )
    print(f"{'':<24}" + "".join(f"{ratio:>22}" for ratio in RATIOS))
    for name in runs[0]:
        cells = [[run[name][i] for run in runs] for i in range(len(RATIOS))]
        print(f"{name:<24}" + "".join(f"{statistics.mean(c):>8.2f} ({min(c):.2f}-{max(c):.2f})" for c in cells))
    print(f"{(time.time() - start) / 60:.1f} minutes")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        about = {"schema": 1, "ratios": RATIOS, "settings": {k: str(v) for k, v in vars(args).items()}, "runs": runs}
        (args.out / "sparsifiner.json").write_text(json.dumps(about, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
