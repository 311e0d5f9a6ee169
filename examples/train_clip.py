"""Train a small CLIP on real pictures with captions, on all patches or on half of them, and compare what comes of it.

    python examples/train_clip.py                      # three seeds, as in docs/results.md; half an hour of one core
    python examples/train_clip.py --small              # seconds, to see that it runs
    python examples/train_clip.py --seed 1             # one seed only; a later call uses what is there

Every setting is trained twice: for as many steps as plain CLIP, and for as many steps as plain CLIP's multiply-adds pay
for. Each finished run is a file under --out and an unfinished one a checkpoint, so a killed call goes on where it
was. The digits are in scikit-learn, the garments in Debian's dataset-fashion-mnist; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from clip_report import plot, show, summary
from open_clip.loss import ClipLoss
from torch import Tensor
from tqdm import tqdm

import vtoken
from vtoken.accounting.compare import command, environment, write_json
from vtoken.accounting.timing import interleaved
from vtoken.demo.captions import CaptionTask, digit_task, garment_task, small_clip, zero_shot_accuracy
from vtoken.demo.clutter import DATA

STEPS = {"digits": 150, "garments": 300}  # of plain CLIP
RATE, WEIGHT_DECAY, WARM_UP_STEPS = 2e-3, 0.05, 20


@dataclass(frozen=True)
class Setting:
    """How the image tower is fed: options of `vtoken.AttentiveMaskCLIP`, and the share of steps without a mask."""

    mode: str = "topk"
    keep_ratio: float = 0.5
    teacher_scale: float = 1.0
    first: float = 0.0
    last: float = 0.0
    budgets: tuple[str, ...] = ("steps", "FLOPs")


SETTINGS = {
    "CLIP": Setting(keep_ratio=1.0, budgets=("steps",)),
    "random": Setting("random"),
    "attentive": Setting(),
    "attentive, half-size teacher": Setting(teacher_scale=0.5),
    "mix": Setting("mix", budgets=("steps",)),
    "lowest": Setting("lowest", budgets=("steps",)),
    # A model that never saw all of a picture is tested on all of it: the last fifth of the steps closes that gap, and
    # the first fifth lets the teacher's attention mean something before it chooses.
    "random, phases": Setting("random", first=0.2, last=0.2),
    "attentive, phases": Setting(first=0.2, last=0.2),
    "attentive, half-size teacher, phases": Setting(teacher_scale=0.5, first=0.2, last=0.2),
}


@dataclass(frozen=True)
class Run:
    """One training; `relative_macs` is its cost, plain CLIP's is 1."""

    task: str
    setting: str
    budget: str  # "steps": as many as plain CLIP; "FLOPs": as many multiply-adds as plain CLIP
    seed: int
    steps: int
    first: int  # steps without a mask at the beginning
    last: int  # and at the end
    batch: int
    relative_macs: float

    def path(self, folder: Path) -> Path:
        """Of its result."""
        setting = "_".join(re.findall(r"\w+", self.setting))
        return folder / "runs" / f"{self.task}_{setting}_{self.steps}x{self.batch}_{self.seed}.json"


def wrap(task: CaptionTask, setting: Setting, *, steps: int | None = None, **options: Any) -> Any:
    """A fresh small CLIP in training mode, masked as the setting says."""
    return vtoken.AttentiveMaskCLIP(
        small_clip(task), keep_ratio=setting.keep_ratio, mode=setting.mode, block=1,
        teacher_scale=setting.teacher_scale, momentum=0.95, total_steps=steps, **options,
    ).train()  # fmt: skip


def learning_rate(step: int, steps: int) -> float:
    """A short warm-up, then a cosine to a twentieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)))
    return RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (0.05 + 0.95 * cosine)


def optimiser(model: Any) -> torch.optim.AdamW:
    """AdamW on what learns; matrices decay, the rest does not."""
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=RATE)


def learn(model: Any, opt: torch.optim.Optimizer, images: Tensor, captions: Tensor) -> float:
    """One optimiser step; returns the loss."""
    out = model(images, captions)
    loss = ClipLoss()(out["image_features"], out["text_features"], out["logit_scale"])
    loss.backward()
    opt.step()
    opt.zero_grad()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))
    return float(loss.detach())


def macs_per_step(task: CaptionTask, setting: Setting) -> int:
    """Multiply-adds of a masked step of the setting, per picture."""
    return int(wrap(task, setting).step_macs(batch=1, views=1))


def runs_of(task: CaptionTask, names: Sequence[str], seed: int, steps: int, batch: int) -> list[Run]:
    """What is to be trained, every setting for each of its budgets."""
    runs = []
    for name in names:
        setting = SETTINGS[name]
        share = macs_per_step(task, setting) / macs_per_step(task, SETTINGS["CLIP"])
        first, last = round(setting.first * steps), round(setting.last * steps)
        for budget in setting.budgets:
            masked = steps - first - last if budget == "steps" else round((steps - first - last) / share)
            cost = (first + last + masked * share) / steps
            runs.append(Run(task.name, name, budget, seed, first + masked + last, first, last, batch, cost))
    return runs


def train(task: CaptionTask, run: Run, folder: Path, save_every: int) -> dict[str, Any]:
    """The result of a run: what an earlier call left, else trained from the last checkpoint or from the beginning."""
    path, checkpoint = run.path(folder), run.path(folder).with_suffix(".pt")
    if path.is_file():
        return asdict(run) | json.loads(path.read_text())
    torch.manual_seed(run.seed)  # all settings of a seed begin with the same weights, and see the same batches
    data, masks = torch.Generator().manual_seed(run.seed), torch.Generator().manual_seed(1000 + run.seed)
    model = wrap(task, SETTINGS[run.setting], steps=run.steps, warmup_steps=run.first, generator=masks)
    opt = optimiser(model)
    if SETTINGS[run.setting].keep_ratio < 1:
        model.attach_ema(opt)
    first = restore(checkpoint, model, opt, {"data": data, "masks": masks}) if checkpoint.is_file() else 0
    label = f"{run.task}, {run.setting}, seed {run.seed}"
    for step in tqdm(range(first, run.steps), initial=first, total=run.steps, desc=label, leave=False):
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, run.steps)
        if step >= run.steps - run.last:
            model.keep_ratio = 1.0
        images, labels = task.draw(run.batch, data)
        loss = learn(model, opt, images, task.captions[labels])
        if (step + 1) % save_every == 0 or step + 1 == run.steps:
            save(checkpoint, model, opt, {"data": data, "masks": masks}, step + 1)
    found = {"accuracy": zero_shot_accuracy(model.unwrap(), task), "last_loss": loss}
    path.write_text(json.dumps(found) + "\n")
    checkpoint.unlink(missing_ok=True)
    return asdict(run) | found


def save(
    path: Path, model: Any, opt: torch.optim.Optimizer, generators: dict[str, torch.Generator], step: int
) -> None:  # fmt: skip
    """Write a checkpoint, whole or not at all."""
    states = {name: generator.get_state() for name, generator in generators.items()}
    partial = path.with_suffix(".partial")
    torch.save(
        {"model": model.state_dict(), "optimiser": opt.state_dict(), "generators": states, "step": step}, partial
    )
    partial.replace(path)


def restore(path: Path, model: Any, opt: torch.optim.Optimizer, generators: dict[str, torch.Generator]) -> int:
    """Load a checkpoint; the number of steps that were done."""
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimiser"])
    for name, generator in generators.items():
        generator.set_state(saved["generators"][name])
    return int(saved["step"])


def time_steps(task: CaptionTask, names: Sequence[str], batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Time of a masked step relative to plain CLIP's: by medians, by minima, and by multiply-adds."""
    images, labels = task.draw(batch, torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], object]] = {}
    for name in dict.fromkeys(["CLIP", *names]):
        model = wrap(task, SETTINGS[name])
        opt = optimiser(model)
        if SETTINGS[name].keep_ratio < 1:
            model.attach_ema(opt)
        runs[name] = functools.partial(learn, model, opt, images, task.captions[labels])
    times = interleaved(runs, rounds=rounds, warmup=2)
    base, macs = times["CLIP"], macs_per_step(task, SETTINGS["CLIP"])
    return {
        name: {
            "time": times[name].median / base.median,
            "time_min": times[name].minimum / base.minimum,
            "macs": macs_per_step(task, SETTINGS[name]) / macs,
        }
        for name in names
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not trained yet, measure, print the tables, write the result file and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--setting", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help=f"of plain CLIP; default: {STEPS}")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15, help="timing samples of a step")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the Fashion-MNIST files")
    parser.add_argument("--out", type=Path, default=Path("out/train_clip"), help="folder of results and checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a few steps of everything, one seed; other options count")
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "--small" in arguments:
        parser.set_defaults(seed=[0], steps=4, batch=8, rounds=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    try:
        tasks = [digit_task() if name == "digits" else garment_task(args.data) for name in args.task]
    except (vtoken.VTokenError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    start, rows, costs = time.process_time(), [], {}
    for task in tasks:
        steps = args.steps or STEPS[task.name]
        runs = [run for seed in args.seed for run in runs_of(task, args.setting, seed, steps, args.batch)]
        rows += [train(task, run, args.out, args.save_every) for run in runs]
        costs[task.name] = time_steps(task, args.setting, args.batch, args.rounds)
    table = summary(rows, costs)
    show(table)
    plot(table, args.out / "train_clip.png")
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    line = command("examples/train_clip.py", arguments)
    about = {
        "example": "train_clip",
        "command": line,
        "settings": settings,
        "environment": environment(torch.device("cpu")),
    }
    path = write_json(args.out / "train_clip.json", about, table)
    print(f"\n{(time.process_time() - start) / 60:.1f} minutes of CPU; wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
