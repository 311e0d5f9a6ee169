"""What fewer image tokens give in a serving engine: vLLM's throughput, prompts and cache, with and without a method.

A LLaVA of middle size with random weights, which vLLM makes itself. For every count an engine is started in a process
of its own with the class of `vtoken.serving`, answers so many prompts with an image each at once, and is ended. The
image tokens that the engine keeps must be those that `vtoken.num_tokens` says, else the exit code is 1. The prefix
cache is off and every image is another one, so all are encoded. Needs vLLM (`make setup-vllm`); says so without.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from options import begin, parse, parser, run, write

from vtoken.core.config import make_config
from vtoken.serving.trial import Trial, trial

SIDE, PATCHES = 336, 576


def save(args: Any, folder: Path) -> None:
    """Config, tokenizer and processor of a LLaVA; weights are the engine's to make."""
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *(f"w{i}" for i in range(507))]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    vision = t.CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, image_size=SIDE,
        patch_size=14,
    )  # fmt: skip
    text = t.LlamaConfig(
        hidden_size=args.width, intermediate_size=args.width * 11 // 4, num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64, num_key_value_heads=args.width // 64, vocab_size=len(words),
        max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = t.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=4, architectures=["LlavaForConditionalGeneration"]
    )
    config.save_pretrained(folder)
    images = t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    t.LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token="<image>",
    ).save_pretrained(folder)  # fmt: skip


def measure(args: Any) -> list[dict[str, Any]]:
    """One row per engine; the first keeps everything."""
    engine = {"dtype": args.dtype, "max_model_len": 1024, "max_num_seqs": args.requests, "load_format": "dummy"}
    question = " ".join(f"w{i}" for i in range(args.text))
    runs: list[tuple[str, dict[str, Any]]] = [("uniform_tokens", {"keep_ratio": 1.0})]
    runs += [(method, {"num_tokens": n}) for method in args.method for n in args.tokens]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        save(args, Path(folder))
        for method, options in runs:
            found: Trial = trial(
                folder, make_config(method, options), (SIDE, SIDE), question=question, requests=args.requests,
                new=args.new, rounds=args.rounds, options=engine,
            )  # fmt: skip
            values = {name: value for name, value in asdict(found).items() if name != "ids"}
            base = rows[0] if rows else values
            rows.append(
                {
                    "name": "whole" if not rows else f"{method} {options['num_tokens']}",
                    **values,
                    "speedup": found.requests_per_second / base["requests_per_second"],
                    "cache_factor": base["cache_bytes"] / found.cache_bytes,
                    "checked": found.image_tokens == found.expected,
                }
            )
    return rows


def show(rows: Sequence[dict[str, Any]], args: Any) -> None:
    """A line per engine."""
    size = f"{args.layers} layers of width {args.width}"
    print(f"LLaVA in vLLM {rows[0]['vllm']}: {size}, {args.requests} prompts at once")
    head = (
        ("", 16),
        ("image", 8),
        ("prompt", 8),
        ("cache MiB", 11),
        ("fewer", 8),
        ("requests/s", 12),
        ("tokens/s", 10),
    )
    print("".join(f"{name:>{width}}" for name, width in (*head, ("faster", 8))))
    for row in rows:
        print(
            f"{row['name']:>16}{row['image_tokens']:>8}{row['prompt_tokens']:>8}{row['cache_bytes'] / 2**20:>11.1f}"
            f"{row['cache_factor']:>7.2f}x{row['requests_per_second']:>12.2f}{row['tokens_per_second']:>10.1f}"
            f"{row['speedup']:>7.2f}x"
        )
        if not row["checked"]:
            print(f"  vtoken.num_tokens says {row['expected']} image tokens")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the result file; 1 if a count is wrong."""
    top = parser("serving", __doc__, rounds=3)
    top.add_argument("--method", nargs="+", default=["vtc_cls"], help="methods in the prompt (vtc_cls)")
    top.add_argument("--tokens", type=int, nargs="+", default=[288, 144, 64], help=f"image tokens kept of {PATCHES}")
    top.add_argument("--text", type=int, default=40, help="words behind the image (40)")
    top.add_argument("--requests", type=int, default=8, help="prompts that are answered at once (8)")
    top.add_argument("--new", type=int, default=16, help="tokens that each is answered with (16)")
    top.add_argument("--width", type=int, default=768, help="of the language model, a multiple of 64 (768)")
    top.add_argument("--layers", type=int, default=8, help="of the language model (8)")
    top.add_argument("--dtype", default="float32", help="of the engine; bfloat16 on a GPU (float32)")
    small = {"width": 128, "layers": 2, "requests": 2, "new": 4, "tokens": [64]}
    args = parse(top, argv, small)
    device = begin(args)
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here: nothing was measured (make setup-vllm)")
        return 0
    rows = measure(args)
    show(rows, args)
    write(args, device, rows)
    return 0 if all(row["checked"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(run(main))
