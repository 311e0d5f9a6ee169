"""What a training step of a CLIP costs with attentive masking: time, memory and multiply-adds against plain CLIP.

A step is forward, contrastive loss, backward, optimiser and teacher update; the first three and the last two are also
timed apart, because the optimiser's share shrinks with the batch. Before that, a setting must count within 1 % of the
closed form, and give every parameter a gradient; one that fails gets no time, and the exit code is 1.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from memory import peak_memory
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from options import begin, parse, parser, run, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vtoken
from vtoken.accounting.timing import Timing, interleaved

CONTEXT, PATCH, TOLERANCE = 77, 16, 0.01


@dataclass(frozen=True)
class Setting:
    """Views and options of `vtoken.AttentiveMaskCLIP`; None is plain CLIP."""

    views: int = 1
    options: dict[str, Any] | None = None
    target: float | None = None  # largest time of a step relative to plain CLIP's, by docs/methods/attentive_clip.md 12


SETTINGS = {
    "CLIP": Setting(),
    "random 50 %": Setting(options={"mode": "random"}),
    "1 x 50 %": Setting(options={}),
    "1 x 50 %, half-size teacher": Setting(options={"teacher_scale": 0.5}, target=0.70),
    "2 x 50 %": Setting(views=2, options={}),
    "2 x 50 %, half-size teacher": Setting(views=2, options={"teacher_scale": 0.5}),
    "1 x 25 %": Setting(options={"keep_ratio": 0.25}),
}


def build(args: Any) -> Any:
    """A CLIP with random weights."""
    vision: Any = {
        "layers": args.layers, "width": args.width, "head_width": 64, "patch_size": PATCH, "image_size": args.image,
    }  # fmt: skip
    text: Any = {
        "layers": args.layers, "width": args.text_width, "heads": args.text_width // 64, "context_length": CONTEXT,
        "vocab_size": args.vocabulary,
    }  # fmt: skip
    return CLIP(args.text_width, vision, text, output_dict=True)


class Trainer:
    """One setting with its model and optimiser, and the parts of its step."""

    def __init__(self, setting: Setting, args: Any, device: torch.device) -> None:
        plain = build(args).to(device)
        masked = setting.options is not None
        self.model: Any = vtoken.AttentiveMaskCLIP(plain, **(setting.options or {})) if masked else plain
        self.loss: Any = vtoken.AttentiveMaskLoss(simclr_weight=0, byol_weight=0) if masked else ClipLoss()
        self.model.train()
        views = [torch.randn(args.batch, 3, args.image, args.image, device=device) for _ in range(setting.views)]
        self.images = views if setting.views > 1 else views[0]
        self.text = torch.randint(args.vocabulary, (args.batch, CONTEXT), device=device)
        self.optimiser = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], fused=True)
        if masked and self.model.mode != "random":  # which has no use for a teacher
            self.model.attach_ema(self.optimiser)

    def gradients(self) -> None:
        """Forward, loss, backward."""
        self.optimiser.zero_grad()
        out = self.model(self.images, self.text)
        self.loss(**out).backward()

    def update(self) -> None:
        """Optimiser and teacher, with the gradients that are there."""
        self.optimiser.step()

    def step(self) -> None:
        """All of it."""
        self.gradients()
        self.update()

    def held(self) -> int:
        """Bytes of weights, teacher and optimiser."""
        state = [value for values in self.optimiser.state.values() for value in values.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *(v for v in state if isinstance(v, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def count(self) -> int:
        """Multiply-adds of one step as torch counts them: matrix products, convolutions and attention."""
        # The counter sees neither the fast path that the teacher would take nor fused attention on a CPU.
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                self.gradients()
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        return counter.get_total_flops() // 2


def formula(setting: Setting, args: Any) -> int:
    """Multiply-adds of a step by docs/methods/attentive_clip.md 12."""
    options = setting.options if setting.options is not None else {"keep_ratio": 1.0}
    model = vtoken.AttentiveMaskCLIP(build(args), **options)
    return model.step_macs(batch=args.batch, views=setting.views)


def faults(trainer: Trainer, counted: int, expected: int) -> str:
    """What is wrong with a setting, or nothing."""
    missing = [name for name, p in trainer.model.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        return f"no gradient for {', '.join(missing[:3])}"
    if abs(counted / expected - 1) > TOLERANCE:
        return f"counts {counted / 1e9:.3f} GMACs, the formula says {expected / 1e9:.3f}"
    return ""


def measure(args: Any, device: torch.device) -> list[dict[str, Any]]:
    """One row per setting, plain CLIP first."""
    names = list(dict.fromkeys(["CLIP", *args.setting]))
    rows, runs = [], {}
    for name in names:
        trainer = Trainer(SETTINGS[name], args, device)
        counted, expected = trainer.count(), formula(SETTINGS[name], args)
        row: dict[str, Any] = {
            "name": name, "batch": args.batch, "target": SETTINGS[name].target, "gmacs": expected / 1e9,
            "gmacs_counted": counted / 1e9, "refused": faults(trainer, counted, expected),
        }  # fmt: skip
        rows.append(row)
        if not row["refused"]:
            trainer.step()  # the optimiser makes its state
            trainer.optimiser.zero_grad()
            gc.collect()
            row |= {"step_bytes": peak_memory(trainer.step, device), "held_bytes": trainer.held()}
            runs[name] = trainer
    if "CLIP" not in runs:
        raise SystemExit(f"plain CLIP {rows[0]['refused']}; there is nothing to compare with")
    parts: dict[str, Callable[[], object]] = {}
    for name, trainer in runs.items():
        parts |= {f"gradients {name}": trainer.gradients, f"update {name}": trainer.update}
    times = interleaved(parts, rounds=args.rounds, warmup=1, device=device)
    return [row if row["refused"] else row | figures(row, rows[0], times) for row in rows]


def figures(row: dict[str, Any], base: dict[str, Any], times: dict[str, Timing]) -> dict[str, Any]:
    """Time and memory of a setting beside plain CLIP's."""

    def seconds(name: str, *parts: str) -> tuple[float, float]:
        spent = [times[f"{part} {name}"] for part in parts]
        return sum(t.median for t in spent), sum(t.minimum for t in spent)

    found: dict[str, Any] = {}
    for key, parts in (("", ("gradients", "update")), ("gradients_", ("gradients",))):
        (own, own_min), (plain, plain_min) = (seconds(r["name"], *parts) for r in (row, base))
        found |= {f"{key}milliseconds": own * 1e3, f"{key}milliseconds_min": own_min * 1e3}
        found |= {f"{key}time_ratio": own / plain, f"{key}time_ratio_min": own_min / plain_min}
    return found | {
        "mac_ratio": row["gmacs"] / base["gmacs"],
        "mac_ratio_counted": row["gmacs_counted"] / base["gmacs_counted"],
        "step_bytes_ratio": row["step_bytes"] / base["step_bytes"] if base["step_bytes"] else None,
        "memory_ratio": (row["step_bytes"] + row["held_bytes"]) / (base["step_bytes"] + base["held_bytes"]),
    }


def show(rows: Sequence[dict[str, Any]], args: Any, device: torch.device) -> None:
    """A line per setting, all but the milliseconds relative to plain CLIP."""
    size = f"image tower {args.layers} x {args.width} at {args.image}, text {args.layers} x {args.text_width}"
    print(f"CLIP, {size}, batch {args.batch}, {args.threads} thread(s), {device}; shares of plain CLIP's step")
    head = ("formula", "counted", "fw+bw", "(min)", "step", "(min)", "step ms", "activ.", "memory")
    print(f"{'':<28}" + "".join(f"{name:>9}" for name in head))
    keys = ("mac_ratio", "mac_ratio_counted", "gradients_time_ratio", "gradients_time_ratio_min", "time_ratio",
            "time_ratio_min", "milliseconds", "step_bytes_ratio", "memory_ratio")  # fmt: skip
    for row in rows:
        if row["refused"]:
            print(f"{row['name']:<28}  no time, the check failed: {row['refused']}")
            continue
        cells = [f"{row[key]:>9.0f}" if key == "milliseconds" else f"{row[key] or 0:>9.2f}" for key in keys]
        print(f"{row['name']:<28}" + "".join(cells) + ("" if row["target"] is None else f"   <= {row['target']:.2f}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the result file; 1 if a check failed."""
    top = parser("training", __doc__, rounds=7)
    top.add_argument("--setting", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    top.add_argument("--layers", type=int, default=6, help="of either tower")
    top.add_argument("--width", type=int, default=384, help="of the image tower, a multiple of 64")
    top.add_argument("--text-width", type=int, default=256, help="of the text tower, a multiple of 64")
    top.add_argument("--image", type=int, default=224, help="side in pixels, a multiple of 64")
    top.add_argument("--batch", type=int, default=4)
    top.add_argument("--vocabulary", type=int, default=49408, help="token ids of the text tower")
    small = {"layers": 4, "width": 64, "text_width": 64, "image": 128, "vocabulary": 500, "batch": 2, "rounds": 2}
    args = parse(top, argv, small)
    device = begin(args)
    rows = measure(args, device)
    show(rows, args, device)
    write(args, device, rows)
    return 1 if any(row["refused"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(run(main))
