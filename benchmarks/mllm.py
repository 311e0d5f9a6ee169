"""What fewer image tokens save in a multimodal model: prefill time and peak memory against kept tokens.

A LLaVA with random weights, mid-size, so that the language model is where the time goes. What is timed is the first
pass of the language model over the prompt that VTC-CLS leaves, and the whole call with tower and projector. Before
that, its logits must equal those of a prompt into which the kept features were put by hand, token by token; a count
that fails gets no speed-up, and the exit code is 1. Memory is the growth of the process (CPU) or of the allocator.

"ideal" is the same language model fed as many embeddings by hand, nothing else: what of the distance between time and
MACs is the machine's (small products run less efficiently) and the host's. "added" is what the method adds to the whole
call: its time over that of tower, projector and the hand-fed language model.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from memory import peak_memory
from options import begin, parse, parser, run, write
from torch import Tensor

import vtoken
from vtoken.accounting.timing import interleaved

IMAGE_TOKEN = 5


def build(args: Any, device: torch.device) -> Any:
    """A LLaVA with a CLIP-like tower of 24 x 24 patches, random weights."""
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    text = transformers.LlamaConfig(
        hidden_size=args.width, intermediate_size=args.width * 11 // 4, num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64, num_key_value_heads=args.width // 64, vocab_size=512,
        max_position_embeddings=4096,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    return transformers.LlavaForConditionalGeneration(config).to(device).eval()


def fed_by_hand(model: Any, ids: Tensor, features: Tensor, kept: Tensor) -> Tensor:
    """Logits of the last position for a prompt whose image features [N, D] but `kept` were left out, one by one."""
    table, rows, place = model.get_input_embeddings(), [], 0
    wanted = set(kept.tolist())
    for token in ids[0]:  # one row: the rows of the batch are the same
        if int(token) != IMAGE_TOKEN:
            rows.append(table(token))
            continue
        if place in wanted:
            rows.append(features[place])
        place += 1
    embeds = torch.stack(rows).expand(ids.shape[0], -1, -1)
    logits: Tensor = model(inputs_embeds=embeds, logits_to_keep=1).logits
    return logits


def prepare(model: Any, ids: Tensor, pixels: Tensor, tokens: int) -> tuple[Callable[[], Any], bool]:
    """The prefill of the prompt that keeps `tokens`, and whether the call's logits are what they should be."""
    seen: list[dict[str, Any]] = []
    inner = model.model.language_model
    handle = inner.register_forward_pre_hook(lambda _m, _a, named: seen.append(dict(named)), with_kwargs=True)
    with vtoken.applied(model, vtoken.VTCCLS(num_tokens=tokens)):
        out, trace = vtoken.trace(model, input_ids=ids, pixel_values=pixels, logits_to_keep=1)
    handle.remove()
    features = model.model.get_image_features(pixel_values=pixels).pooler_output[0]
    reference = fed_by_hand(model, ids, features, trace.prompt.kept[0])
    error = float((out.logits - reference).abs().max() / reference.abs().max())
    named = {name: value for name, value in seen[0].items() if name not in ("past_key_values", "cache")}
    named["use_cache"] = True
    return functools.partial(inner, **named), error < 1e-4 and set(trace.prompt.lengths) == {tokens}


def hand_fed(model: Any, pixels: Tensor, rows: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """The language model over that many random embeddings per prompt: alone, and behind tower and projector."""
    inner = model.model.language_model
    embeds = torch.randn(pixels.shape[0], rows, inner.config.hidden_size, device=pixels.device)
    alone = functools.partial(inner, inputs_embeds=embeds, use_cache=True)

    def call() -> object:
        model.model.get_image_features(pixel_values=pixels)
        return model.lm_head(alone().last_hidden_state[:, -1:])

    return alone, call


def whole(model: Any, ids: Tensor, pixels: Tensor, tokens: int) -> Callable[[], object]:
    """The whole call, as users make it."""

    def call() -> object:
        with vtoken.applied(model, vtoken.VTCCLS(num_tokens=tokens)):
            return model(input_ids=ids, pixel_values=pixels, logits_to_keep=1)

    return call


def measure(args: Any, device: torch.device) -> list[dict[str, Any]]:
    """One row per kept count, the whole image first."""
    model = build(args, device)
    pixels = torch.randn(1, 3, 336, 336, device=device).expand(args.batch, -1, -1, -1)
    text = torch.randint(6, 512, (args.text,), device=device)
    image = torch.full((576,), IMAGE_TOKEN, device=device)
    ids = torch.cat([text[: args.text // 2], image, text[args.text // 2 :]]).expand(args.batch, -1)
    counts = [576, *(k for k in args.tokens if k != 576)]
    prepared = {k: prepare(model, ids, pixels, k) for k in counts}
    calls = {k: whole(model, ids, pixels, k) for k in counts}
    ideal = {k: hand_fed(model, pixels, k + args.text) for k in counts}
    memory = {k: peak_memory(prepared[k][0], device) for k in counts}
    variants: dict[str, Callable[[], object]] = {f"prefill {k}": prepared[k][0] for k in counts}
    variants |= {f"ideal {k}": ideal[k][0] for k in counts} | {f"call {k}": calls[k] for k in counts}
    variants |= {f"ideal call {k}": ideal[k][1] for k in counts}
    times = interleaved(variants, rounds=args.rounds, warmup=1, device=device)
    full = vtoken.prompt_report(model, vtoken.VTCCLS(num_tokens=576), text_tokens=args.text).before
    rows = []
    for k in counts:
        cost = vtoken.prompt_report(
            model, vtoken.VTCCLS(num_tokens=k), text_tokens=args.text, bytes_per_element=4
        ).after
        prefill, call = times[f"prefill {k}"], times[f"call {k}"]
        rows.append(
            {
                "tokens": k,
                "checked": prepared[k][1],
                "prefill_gmacs": args.batch * cost.prefill_macs / 1e9,
                "mac_ratio": cost.prefill_macs / full.prefill_macs,
                "prefill_seconds": prefill.median,
                "prefill_ratio": prefill.median / times["prefill 576"].median,
                "prefill_ratio_minima": prefill.minimum / times["prefill 576"].minimum,
                "ideal_ratio": times[f"ideal {k}"].median / times["ideal 576"].median,
                "call_seconds": call.median,
                "call_mac_ratio": cost.macs / full.macs,
                "call_ratio": call.median / times["call 576"].median,
                "added_share": call.median / times[f"ideal call {k}"].median - 1,
                "peak_bytes": memory[k],
                "cache_bytes": args.batch * cost.cache_bytes,
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]], args: Any, device: torch.device) -> None:
    """A line per count; none of its speed if the check failed."""
    size = f"{args.layers} layers of width {args.width}, {args.batch} prompt(s) with {args.text} text tokens"
    print(f"LLaVA, {size}, {args.threads} thread(s), {device}")
    head = ("kept", "GMACs", "MAC ratio", "prefill s", "time ratio", "(min)", "ideal", "call ratio", "(MACs)", "added")
    print(" ".join(f"{name:>10}" for name in (*head, "peak MiB", "cache MiB")))
    for row in rows:
        figures = [f"{row['tokens']}", f"{row['prefill_gmacs']:.1f}", f"{row['mac_ratio']:.3f}"]
        if row["checked"]:
            ratios = ("prefill_seconds", "prefill_ratio", "prefill_ratio_minima", "ideal_ratio")
            figures += [f"{row[name]:.3f}" for name in (*ratios, "call_ratio", "call_mac_ratio")]
            figures.append(f"{row['added_share']:+.1%}")
            figures += [f"{row[name] / 2**20:.0f}" for name in ("peak_bytes", "cache_bytes")]
        print(" ".join(f"{figure:>10}" for figure in figures), end="" if not row["checked"] else "\n")
        if not row["checked"]:
            print("  logits differ from the hand-fed prompt: no speed-up to speak of")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the result file; 1 if a check failed."""
    top = parser("mllm", __doc__, rounds=5)
    top.add_argument("--tokens", type=int, nargs="+", default=[288, 192, 128, 64, 32], help="image tokens kept of 576")
    top.add_argument("--text", type=int, default=60, help="text tokens in the prompt")
    top.add_argument("--width", type=int, default=1024, help="of the language model, a multiple of 256")
    top.add_argument("--layers", type=int, default=6, help="of the language model")
    top.add_argument(
        "--batch", type=int, default=4, help="prompts; small products run less efficiently than large ones"
    )
    args = parse(top, argv, {"width": 256, "layers": 2, "batch": 1, "tokens": [64], "rounds": 3})
    device = begin(args)
    with torch.inference_mode():
        rows = measure(args, device)
    show(rows, args, device)
    write(args, device, rows)
    return 0 if all(row["checked"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(run(main))
