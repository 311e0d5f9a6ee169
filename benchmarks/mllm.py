"""What fewer image tokens save in a multimodal model, and what choosing them costs.

Models with random weights, mid-size, so that the language model is where the time goes; one prompt with one image.

Part "prefill", for every family: the first pass of the language model over the prompt that VTC-CLS leaves, beside its
multiply-adds; the whole call; and, apart, the tower, the choice (reading attention in the tower, and choosing) and the
engine's own work, which is all that vtoken does beside them: laying out, counting, shortening the prompt, gathering
rows. "keep all" is a patched call that keeps every token over the unpatched one. Before that, the pruned call's logits
must equal those of the unpatched model for a prompt that was shortened by a loop; a count that fails gets no speed-up,
and the exit code is 1. Memory is the growth of the process (CPU) or of the allocator.

Part "choice": every method keeps 192 of 2880 tokens, which are one grid, or an overview and a grid of 2 x 2 crops of
576 each (LLaVA-NeXT, 195 tokens: shares are rounded up), beside the tower that made them.

Quotients are medians of quotients within rounds of all variants.
"""

from __future__ import annotations

import copy
import functools
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from memory import peak_memory
from multimodal import FAMILIES, IMAGE, Size, build, call
from options import begin, parse, parser, run, write
from small import paired, time_in_rounds
from torch import Tensor

import vtoken
from vtoken.accounting.prefill import kv_cache_bytes, prefill_macs
from vtoken.core.method import PromptMethod
from vtoken.core.visual import Cell, Encoded, Visual
from vtoken.prompts.calls import fresh
from vtoken.prompts.engine import Layout, lay_out, prepare, seen_of, service_of
from vtoken.prompts.family import like, named_for, rows_of

SIDE_ARGUMENTS = ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask")
#: A share of the prefill, and a patched call that keeps all over the unpatched one.
TARGETS = {"engine_share": 0.01, "keep_all_ratio": 1.02}
METHODS: dict[str, Callable[..., Any]] = {
    "VTC-CLS": vtoken.VTCCLS,
    "DivPrune": vtoken.DivPrune,
    "DivPrune, before the projector": functools.partial(vtoken.DivPrune, space="before"),
    "VisionZip": vtoken.VisionZip,
    "CDPruner": vtoken.CDPruner,
    "RandomTokens": vtoken.RandomTokens,
    "UniformTokens": vtoken.UniformTokens,
    "PooledTokens": vtoken.PooledTokens,
}


def features_of(model: Any, given: dict[str, Tensor]) -> Any:
    """What the model's own tower and projector give for the image."""
    encode = model.model.get_image_features
    return encode(**named_for(encode, given, SIDE_ARGUMENTS), return_dict=True)


def language_model(model: Any) -> Any:
    """The part that reads the prompt."""
    return getattr(model.model, "language_model", None) or model.model.text_model


def fed_by_hand(plain: Any, given: dict[str, Tensor], kept: Tensor) -> Tensor:
    """Logits of the last position of the unpatched model for a prompt with the rows `kept` of its image alone."""
    wanted, places, at = set(kept.tolist()), [], 0
    for place, token in enumerate(given["input_ids"][0].tolist()):
        if token != IMAGE or at in wanted:
            places.append(place)
        at += token == IMAGE
    index, inner = torch.tensor(places, device=kept.device), plain.model
    short = {name: given[name][:, index] for name in ("input_ids", "attention_mask", "token_type_ids") if name in given}
    if "image_grid_thw" in given:
        numbered = inner.get_rope_index(
            **{name: given[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
        )[0]
        line = torch.arange(len(places), device=index.device).view(1, 1, -1)
        short["position_ids"] = torch.cat([line, numbered[:, :, index]])
    out = features_of(plain, given)
    fields = {"pooler_output": like(out.pooler_output, [rows_of(out)[kept]])}
    if getattr(out, "deepstack_features", None) is not None:
        fields["deepstack_features"] = [
            like(level, [(level if isinstance(level, Tensor) else torch.cat(list(level)))[kept]])
            for level in out.deepstack_features
        ]
    inner.get_image_features = lambda *_, **__: fresh(out, **fields)
    try:
        logits: Tensor = plain(**short, pixel_values=torch.empty(1, device=index.device), logits_to_keep=1).logits
    finally:
        del inner.get_image_features
    return logits


def prefill(model: Any, given: dict[str, Tensor]) -> tuple[Callable[[], object], int]:
    """The language model's first pass in a call of the model, and its tokens."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    inner = language_model(model)
    handle = inner.register_forward_pre_hook(lambda _m, args, named: seen.append((args, dict(named))), with_kwargs=True)
    model(**given, logits_to_keep=1)
    handle.remove()
    ((args, named),) = seen
    named = {name: value for name, value in named.items() if name not in ("past_key_values", "cache")}
    return functools.partial(inner, *args, **named | {"use_cache": True}), named["inputs_embeds"].shape[1]


class Ready:
    """A family whose towers have run already."""

    def __init__(self, family: Any, encoded: Encoded) -> None:
        self.family, self.encoded = family, encoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def encode(self, *_: object) -> Encoded:
        return self.encoded


@contextmanager
def encoded_as(model: Any, encoded: Encoded) -> Iterator[None]:
    """The model with a family whose towers have run already."""
    family = model._vtoken_family
    model._vtoken_family = Ready(family, encoded)
    try:
        yield
    finally:
        model._vtoken_family = family


def chooser(model: Any, plan: Layout, encoded: Encoded, text: Tensor | None = None) -> Callable[[], object]:
    """The methods' choice for every visual of a call."""
    each = [
        (method, seen_of(visual, count, clues, encoded, i, text))
        for i, (visual, method, clues, count) in enumerate(
            zip(plan.visuals, plan.methods, plan.clues, plan.counts, strict=True)
        )
    ]
    return lambda: [method.choose(seen) for method, seen in each]


def prefill_rows(
    family: str, tokens: Sequence[int], args: Any, device: torch.device, rng: random.Random
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per count, out of the 576 that most families have, or that share of another number; all of them first."""
    size = Size(args.width, args.layers, args.tower_width, args.tower_layers, args.side)
    plain = build(family, size).to(device)
    made = call(family, size, args.text, torch.Generator().manual_seed(args.seed))
    given = {name: value.to(device) for name, value in made.items()}
    model = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})  # the weights are shared
    vtoken.apply(model, vtoken.VTCCLS(keep_ratio=1.0))
    whole, length = prefill(plain, given)
    tower = functools.partial(features_of, plain, given)

    def pruned(share: float) -> object:
        with vtoken.budget(model, keep_ratio=share):
            return model(**given, logits_to_keep=1)

    variants: dict[str, Callable[[], object]] = {
        "stock": functools.partial(plain, **given, logits_to_keep=1),
        "all": functools.partial(model, **given, logits_to_keep=1), "prefill": whole, "tower": tower,
    }  # fmt: skip
    found: dict[int, dict[str, Any]] = {}
    for count in tokens:
        share = count / args.side**2
        with vtoken.budget(model, keep_ratio=share):
            out, trace = vtoken.trace(model, **given, logits_to_keep=1)
            plan = lay_out(service_of(model), given, given["input_ids"])
            encoded = model._vtoken_family.encode(model, given, plan.visuals, plan.needs["image"])
            first_pass, rows = prefill(model, given)
        (kept,) = trace.prompt.kept
        reference = fed_by_hand(plain, given, kept)
        error = float((out.logits - reference).abs().max() / reference.abs().max())
        found[count] = {
            "tokens": len(kept), "rows": rows, "checked": error < 1e-4 and rows == length + len(kept) - _image(given),
            "peak_bytes": peak_memory(first_pass, device),
        }  # fmt: skip

        def own(share: float = share, encoded: Encoded = encoded) -> object:
            with encoded_as(model, encoded), vtoken.budget(model, keep_ratio=share):
                short = prepare(service_of(model), dict(given), generating=False)
                assert short is not None
                return model._vtoken_family.hand_over(model, dict(short.call), generating=False)

        variants |= {
            f"call {count}": functools.partial(pruned, share), f"prefill {count}": first_pass, f"own {count}": own,
            f"choose {count}": chooser(model, plan, encoded),
        }  # fmt: skip
        variants.setdefault(
            "watched", functools.partial(model._vtoken_family.encode, model, given, plan.visuals, plan.needs["image"])
        )
    peak = peak_memory(whole, device)
    seconds = time_in_rounds(variants, args.rounds, device, rng)
    macs = functools.partial(prefill_macs, model)
    common = {
        "part": "prefill", "family": family, "text": args.text, "rounds": args.rounds,
        "prefill_seconds": statistics.median(seconds["prefill"]),
        "tower_share": paired(seconds["tower"], seconds["prefill"]),
        "keep_all_ratio": paired(seconds["all"], seconds["stock"]),
        "keep_all_ratio_minima": min(seconds["all"]) / min(seconds["stock"]),
    }  # fmt: skip
    result = [
        common | {
            "tokens": _image(given), "kept": _image(given), "checked": True, "gmacs": macs(length) / 1e9,
            "peak_bytes": peak, "cache_bytes": kv_cache_bytes(model, length, 4),
        }
    ]  # fmt: skip
    for count, of in found.items():
        watch = [w - t for w, t in zip(seconds["watched"], seconds["tower"], strict=True)]
        own_work = [o - c for o, c in zip(seconds[f"own {count}"], seconds[f"choose {count}"], strict=True)]
        first_pass_seconds = seconds[f"prefill {count}"]
        result.append(
            common | {
                "tokens": _image(given), "kept": of["tokens"], "checked": of["checked"],
                "gmacs": macs(of["rows"]) / 1e9, "mac_ratio": macs(of["rows"]) / macs(length),
                "prefill_ratio": paired(first_pass_seconds, seconds["prefill"]),
                "prefill_ratio_minima": min(first_pass_seconds) / min(seconds["prefill"]),
                "call_ratio": paired(seconds[f"call {count}"], seconds["stock"]),
                "watch_share": statistics.median(watch) / common["prefill_seconds"],
                "choose_share": paired(seconds[f"choose {count}"], seconds["prefill"]),
                "engine_milliseconds": 1e3 * statistics.median(own_work),
                "engine_share": paired(own_work, seconds["prefill"]),
                "peak_bytes": of["peak_bytes"], "cache_bytes": kv_cache_bytes(model, of["rows"], 4),
            }
        )  # fmt: skip
        result[-1]["missed"] = [name for name, most in TARGETS.items() if result[-1][name] > most]
    return result


def _image(given: dict[str, Tensor]) -> int:
    return int((given["input_ids"] == IMAGE).sum())


def choice_rows(args: Any, device: torch.device, rng: random.Random) -> list[dict[str, Any]]:
    """One row per method: its time on five grids, on one grid of as many tokens, and what it reads in the tower."""
    size = Size(args.choice_width, 1, args.choice_tower_width, args.choice_tower_layers, 2 * args.side)
    plain = build("llava_next", size).to(device)
    generator = torch.Generator().manual_seed(args.seed)
    given = {n: v.to(device) for n, v in call("llava_next", size, args.text, generator).items()}
    words = plain.get_input_embeddings()(given["input_ids"][0, -args.text // 2 :])
    tokens = 5 * args.side**2
    share, one = 1 / 15, Visual("image", (Cell((2 * args.side, 5 * args.side // 2)),))
    variants: dict[str, Callable[[], object]] = {"tower": functools.partial(features_of, plain, given)}
    kept = {}
    for name, make in METHODS.items():
        model = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
        vtoken.apply(model, make(keep_ratio=share))
        plan = lay_out(service_of(model), given, given["input_ids"])
        encoded = model._vtoken_family.encode(model, given, plan.visuals, plan.needs["image"])
        variants[name] = chooser(model, plan, encoded, words)
        kept[name] = plan.counts[0]
        if plan.needs["image"].attention != "none":
            variants[f"watched {name}"] = functools.partial(
                model._vtoken_family.encode, model, given, plan.visuals, plan.needs["image"]
            )
        method = model._vtoken.methods[PromptMethod]
        flat = replace(
            seen_of(plan.visuals[0], plan.counts[0], {}, encoded, 0, words), visual=one, count=method.count(one, {})
        )
        variants[f"{name}, one grid"] = functools.partial(method.choose, flat)
    seconds = time_in_rounds(variants, args.choice_rounds, device, rng)
    result = []
    for name in METHODS:
        watch = 0.0
        if f"watched {name}" in seconds:
            watch = paired(seconds[f"watched {name}"], seconds["tower"]) - 1
        result.append(
            {
                "part": "choice", "name": name, "tokens": tokens, "kept": kept[name], "rounds": args.choice_rounds,
                "seconds": statistics.median(seconds[name]), "of_tower": paired(seconds[name], seconds["tower"]),
                "one_grid_seconds": statistics.median(seconds[f"{name}, one grid"]),
                "one_grid_of_tower": paired(seconds[f"{name}, one grid"], seconds["tower"]),
                "watch_of_tower": watch, "tower_seconds": statistics.median(seconds["tower"]),
            }
        )  # fmt: skip
    return result


PREFILL_HEAD = (
    f"{'family':<12}{'kept':>12}{'MAC ratio':>11}{'prefill':>9}{'(min)':>7}{'call':>7}{'tower':>8}{'watch':>8}"
    f"{'choose':>8}{'engine':>8}{'ms':>7}{'keep all':>10}{'(min)':>7}{'peak MiB':>10}{'cache':>7}"
)
CHOICE_HEAD = f"{'method':<32}{'kept':>6}{'ms':>9}{'of tower':>10}{'one grid ms':>13}{'of tower':>10}{'reading':>9}"


def prefill_line(row: dict[str, Any]) -> str:
    """One row as text; nothing of its speed if the check failed."""
    head = f"{row['family']:<12}{row['kept']:>6}/{row['tokens']:<5}"
    if "mac_ratio" not in row:
        return f"{head}  {row['gmacs']:.1f} GMACs in {row['prefill_seconds']:.3f} s"
    if not row["checked"]:
        return f"{head}  logits differ from the hand-fed prompt: no speed-up to speak of"
    cells = f"{row['mac_ratio']:>11.3f}{row['prefill_ratio']:>9.3f}{row['prefill_ratio_minima']:>7.3f}"
    cells += f"{row['call_ratio']:>7.3f}{row['tower_share']:>8.1%}{row['watch_share']:>8.1%}{row['choose_share']:>8.2%}"
    cells += f"{row['engine_share']:>8.2%}{row['engine_milliseconds']:>7.2f}{row['keep_all_ratio']:>10.3f}"
    cells += f"{row['keep_all_ratio_minima']:>7.3f}{row['peak_bytes'] / 2**20:>10.0f}{row['cache_bytes'] / 2**20:>7.0f}"
    missed = ", ".join(f"{name} above {TARGETS[name]}" for name in row["missed"])
    return head + cells + (f"   MISSED: {missed}" if missed else "")


def choice_line(row: dict[str, Any]) -> str:
    """One row as text."""
    cells = f"{row['kept']:>6}{1e3 * row['seconds']:>9.1f}{row['of_tower']:>10.2%}"
    cells += f"{1e3 * row['one_grid_seconds']:>13.1f}{row['one_grid_of_tower']:>10.2%}{row['watch_of_tower']:>9.1%}"
    return f"{row['name']:<32}{cells}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, write the result file; 1 if a check failed or, in earnest, a target was missed."""
    top = parser("mllm", __doc__, rounds=5)
    top.add_argument("--family", nargs="+", default=list(FAMILIES), choices=FAMILIES, help="models")
    top.add_argument("--tokens", type=int, nargs="+", default=[192], help="image tokens kept of 576, of every family")
    top.add_argument("--sweep", type=int, nargs="*", default=[288, 192, 128, 64, 32], help="the same for LLaVA")
    top.add_argument("--text", type=int, default=60, help="text tokens in the prompt")
    top.add_argument("--width", type=int, default=1024, help="of the language model, a multiple of 256")
    top.add_argument("--layers", type=int, default=3, help="of the language model")
    top.add_argument("--tower-width", type=int, default=256, help="of the image tower, a multiple of 64")
    top.add_argument("--tower-layers", type=int, default=3, help="of the image tower")
    top.add_argument("--side", type=int, default=24, help="tokens along one side of the image, a multiple of 4")
    top.add_argument("--choice-width", type=int, default=1024, help="of the language model in part 'choice'")
    top.add_argument("--choice-tower-width", type=int, default=512, help="of the tower in part 'choice'")
    top.add_argument("--choice-tower-layers", type=int, default=6, help="of the tower in part 'choice'")
    top.add_argument("--choice-rounds", type=int, default=3, help="timing samples in part 'choice'; 0 leaves it out")
    args = parse(
        top,
        argv,
        {
            "width": 256, "layers": 2, "tower_width": 64, "tower_layers": 3, "side": 8, "tokens": [16],
            "sweep": [32, 16], "rounds": 3, "choice_width": 256, "choice_tower_width": 64, "choice_tower_layers": 3,
            "text": 20,
        },
    )  # fmt: skip
    device, rng = begin(args), random.Random(args.seed)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        size = f"{args.layers} layers of width {args.width}"
        print(f"{size}, {args.text} text tokens, {args.threads} thread(s), {device}")
        print(PREFILL_HEAD)
        for family in args.family:
            found = prefill_rows(family, args.sweep if family == "llava" else args.tokens, args, device, rng)
            for row in found:
                print(prefill_line(row), flush=True)
            rows += found
            write(args, device, rows)  # a run that is cut off leaves what it found
        if args.choice_rounds:
            chosen = choice_rows(args, device, rng)
            print(f"\nchoosing from {chosen[0]['tokens']} tokens; the tower takes {chosen[0]['tower_seconds']:.2f} s")
            print(CHOICE_HEAD)
            for row in chosen:
                print(choice_line(row))
            rows += chosen
    write(args, device, rows)
    failed = any(not row["checked"] for row in rows if row["part"] == "prefill")
    return 1 if failed or (not args.small and any(row.get("missed") for row in rows)) else 0


if __name__ == "__main__":
    sys.exit(run(main))
