"""Train Sparsifiner on the shipped ViT for cluttered Fashion-MNIST: predictors first, then the backbone under masks.

    python examples/train_sparsifiner.py                     # three seeds, what docs/results.md reports; under an hour
    python examples/train_sparsifiner.py --small             # seconds, to see that it runs

Accuracy on test canvases at several keep ratios, beside the dense model and beside a control with random masks of the
same density; both before and after the backbone is fine-tuned, just as long, on the same canvases. One model serves all
ratios: every step of the second phase draws one of them. (At ratio 1 its attention is dense, so that column tells what
the fine-tuning alone does.) The result file grows seed by seed: a run that was cut off goes on where it stopped, and
several processes may do different --seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
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
from vtoken.accounting.compare import command, environment
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
#: Ends of row names: the backbone as it came, and after the second phase.
HOWS = ("", ", tuned")


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
    model: Any,
    teacher: Teacher,
    data: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    rate: float,
    seed: int,
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
def right(model: nn.Module, canvases: Tensor, labels: Tensor) -> Tensor:
    """Which canvases are classified rightly, bool [N]; in bfloat16, as in training."""
    hits = []
    for part, label in zip(canvases.split(50), labels.split(50), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            hits.append(model(part).argmax(-1) == label)
    return torch.cat(hits)


def sweep(model: nn.Module, canvases: Tensor, labels: Tensor, name: str, ratios: Sequence[float]) -> Tensor:
    """`right` at each keep ratio, [ratios, N]."""
    found = []
    for ratio in tqdm(ratios, desc=name, leave=False):
        vtoken.configure(model, keep_ratio=ratio, phase="sparse")
        found.append(right(model, canvases, labels))
    return torch.stack(found)


def sparse_model(args: argparse.Namespace, mode: str, seed: int) -> Any:
    """The dense model's weights under Sparsifiner; "masked", the fastest form here that has gradients."""
    model = load_clutter_vit(args.weights)
    return vtoken.apply(model, vtoken.Sparsifiner(mode=mode, seed=seed, backend="masked"))


def one_seed(args: argparse.Namespace, seed: int, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracies by row and keep ratio, and on how many canvases learned and random masks disagree."""
    test = load_test_canvases(args.test, seed=seed, folder=args.data)
    dense = load_clutter_vit(args.weights)
    teacher = Teacher(dense)

    hits = {"dense": right(dense, *test).expand(len(RATIOS), -1)}
    loss = None
    for name, mode in (("random", "random"), ("learned", "exact")):
        model = sparse_model(args, mode, seed)
        if mode == "exact":
            loss = learn_predictors(model, batches(images, labels, args.batch, seed), args.recon_steps, args.recon_rate)
        hits[name] = torch.cat([hits["dense"][:1], sweep(model, *test, name, RATIOS[1:])])
        data = batches(images, labels, args.batch, seed + 100)
        fine_tune(model, teacher, data, args.tune_steps, args.tune_rate, seed)
        hits[f"{name}, tuned"] = sweep(model, *test, f"{name}, tuned", RATIOS)
        if mode == "exact" and args.save is not None:
            args.save.mkdir(parents=True, exist_ok=True)
            save_file(dict(model.state_dict()), args.save / f"sparsifiner_{seed}.safetensors")
    rows = {name: [100 * int(h.sum()) / len(h) for h in hit] for name, hit in hits.items()}
    differ = {how: (hits[f"learned{how}"] != hits[f"random{how}"]).sum(1).tolist() for how in HOWS}
    return {"seed": seed, "reconstruction_loss": loss, "top1": rows, "disagreements": differ}


def table(runs: Sequence[dict[str, Any]], canvases: int) -> Iterator[str]:
    """Lines: every row's mean and spread over seeds, then learned minus random, in pairs."""
    count = len(runs)
    yield f"top-1 in per cent by keep ratio, mean over {count} seed(s) (lowest-highest), {canvases} canvases each"
    yield f"{'':<18}" + "".join(f"{ratio:>20}" for ratio in RATIOS)
    for name in runs[0]["top1"]:
        cells = [[run["top1"][name][i] for run in runs] for i in range(len(RATIOS))]
        texts = [f"{statistics.mean(c):.2f} ({min(c):.1f}-{max(c):.1f})" for c in cells]
        yield f"{name:<18}" + "".join(f"{text:>20}" for text in texts)
    yield "learned minus random: mean +- standard error from the seeds / from the canvases on which the two differ"
    for how in HOWS:
        texts = []
        for i in range(len(RATIOS)):
            gaps = [run["top1"][f"learned{how}"][i] - run["top1"][f"random{how}"][i] for run in runs]
            among = statistics.stdev(gaps) / count**0.5 if count > 1 else math.nan
            differ = sum(run["disagreements"][how][i] for run in runs)
            texts.append(f"{statistics.mean(gaps):+.2f} +-{among:.2f}/{100 * differ**0.5 / (canvases * count):.2f}")
        yield f"{'difference' + how:<18}" + "".join(f"{text:>20}" for text in texts)


def finished(path: Path, settings: dict[str, str]) -> list[dict[str, Any]]:
    """Seeds that an earlier run with the same settings has left in the result file."""
    if not path.is_file():
        return []
    about = json.loads(path.read_text())
    if about.get("settings") != settings:
        raise vtoken.ConfigError(f"{path} holds results of other settings; delete it or name another --out")
    runs: list[dict[str, Any]] = about["runs"]
    return runs


def options() -> argparse.ArgumentParser:
    """What --help lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Not 0 to 5: on their canvases a rate of 1e-4 for the second phase was found to be too high, and 200 and 80 steps
    # too few.
    parser.add_argument("--seeds", type=int, nargs="+", default=[6, 7, 8])
    parser.add_argument("--recon-steps", type=int, default=800)
    parser.add_argument("--tune-steps", type=int, default=300)
    parser.add_argument("--recon-rate", type=float, default=1e-2)
    parser.add_argument("--tune-rate", type=float, default=3e-5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--test", type=int, default=1000, help="test canvases, other ones for every seed")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the Fashion-MNIST files")
    parser.add_argument("--weights", type=Path, help="the dense model; default: the one in the repository")
    parser.add_argument("--out", type=Path, default=Path("out/train_sparsifiner.json"), help="result file")
    parser.add_argument("--save", type=Path, help="folder for the trained models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="one seed, two steps of everything")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, print the table."""
    parser = options()
    if "--small" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(seeds=[0], recon_steps=2, tune_steps=2, batch=4, test=50)
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("out", "save", "seeds")}
    start = time.time()
    try:
        images, labels = read_fashion_mnist("train", args.data)
        done = {run["seed"] for run in finished(args.out, settings)}
        for seed in [seed for seed in args.seeds if seed not in done]:
            run = one_seed(args, seed, images, labels)
            runs = sorted([*finished(args.out, settings), run], key=operator.itemgetter("seed"))
            about = {"schema": 1, "command": command("examples/train_sparsifiner.py", arguments),
                     "ratios": RATIOS, "settings": settings, "environment": environment(torch.device("cpu")),
                     "runs": runs}  # fmt: skip
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(about, indent=1) + "\n")
            print(f"seed {seed} after {(time.time() - start) / 60:.1f} minutes", flush=True)
    except vtoken.VTokenError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(table(finished(args.out, settings), args.test)))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
