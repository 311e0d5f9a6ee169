"""What version 0.1 made of prompts, as files: `python -m tests.prompts.frozen.make` writes them, the test compares.

They were written before images and videos came to share one engine (`beside` by version 0.2, just before that), and are
not to be written anew because something else comes out: a kept set, a logit or a generated id that differs is what the
test is there to find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vtoken
from tests.hosts import llavas
from tests.quota import builders

HERE = Path(__file__).parent
IMAGES, VIDEOS, BESIDE = (HERE / f"{name}.safetensors" for name in ("images", "videos", "beside"))
#: Image sizes (height, width) of the models that cut images into crops.
SIZES = [[30, 60], [70, 24], [48, 48]]
FLAT: list[dict[str, Any]] = [
    {"num_tokens": 1},
    {"num_tokens": 9},
    {"keep_ratio": 0.4, "positions": "original"},
    {"num_tokens": 6, "start_layer": 0, "ensemble": "max", "scorer": "received"},
    {"num_tokens": 36},
]
CROPS: list[dict[str, Any]] = [
    {"num_tokens": 9},
    {"num_tokens": 5, "newline": "all"},
    {"keep_ratio": 0.3, "newline": "none", "positions": "original"},
    {"num_tokens": 12, "start_layer": 0, "ensemble": "min"},
]
SHARES: list[dict[str, Any]] = [
    {"budget": 0.5},
    {"budget": 11, "mode": "pool", "power": 1.0},
    {"budget": 0.75, "mode": "merge", "count_separators": True},
    {"budget": 9, "mode": "stride", "min_tokens": 1},
    {"budget": 13, "rounding": "floor", "shape": "floor"},
]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
BEAMS: dict[str, Any] = {"max_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}


def _of(model: Any, given: dict[str, Any], ways: list[str], more: dict[str, Any]) -> dict[str, Tensor]:
    out, trace = vtoken.trace(model, **given, **more)
    # All rows of the last places, and the mean over the others: small files that still miss nothing.
    found = {"logits": torch.cat([out.logits[:, -3:], out.logits.mean(1, keepdim=True)], dim=1)}
    if trace.prompt is not None:
        found |= {f"kept{i}": kept for i, kept in enumerate(trace.prompt.kept)}
        found |= {f"scores{i}": scores for i, scores in enumerate(trace.prompt.scores)}
        found |= {"index": trace.prompt.index, "ids": trace.prompt.input_ids}
    if trace.video is not None:
        found |= {f"tokens{i}": torch.tensor(r.tokens_per_frame) for i, r in enumerate(trace.video.reports)}
        found |= {"index": trace.video.index, "ids": trace.video.input_ids}
    for name, way in (("greedy", GREEDY), ("beams", BEAMS)):
        if name in ways:
            found[name] = model.generate(**given, **more, **way)
    return found


def images() -> Iterator[tuple[str, Callable[[], dict[str, Tensor]]]]:
    """Names of cases of `vtoken.VTCCLS`, and what computes them."""
    for kind in (*llavas.FLAT, *llavas.ANYRES):
        model = llavas.build(kind)
        crops = kind in llavas.ANYRES
        for s, options in enumerate(CROPS if crops else FLAT):
            for pad in ("left", "right"):
                given = _crops(model) if crops else _flat(model, kind)
                ids, mask = _padded(given.pop("rows"), pad)
                given |= {"input_ids": ids, "attention_mask": mask}
                ways = [] if pad == "right" else ["greedy", "beams"] if s == 1 else ["greedy"]
                yield f"{kind}.{s}.{pad}", lambda m=model, g=given, o=options, w=ways: _image(m, g, o, w)


def _image(model: Any, given: dict[str, Any], options: dict[str, Any], ways: list[str]) -> dict[str, Tensor]:
    with vtoken.applied(model, vtoken.VTCCLS(**options)):
        return _of(model, given, ways, {})


def _flat(model: Any, kind: str) -> dict[str, Any]:
    n = llavas.feature_count(kind)
    return {"rows": [[1, -n, 5, -n, 7], [1, 6, 7], [1, -n, 8, 9]]} | llavas.shown(model, llavas.images(3))


def _crops(model: Any) -> dict[str, Any]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    sizes = torch.tensor(SIZES)
    crops = [image_size_to_num_patches(size, llavas.PINPOINTS, 24) for size in SIZES]
    rng = torch.Generator().manual_seed(5)
    pixels = torch.zeros(len(SIZES), max(crops), 3, 24, 24)
    for i, n in enumerate(crops):
        pixels[i, :n] = torch.randn(n, 3, 24, 24, generator=rng)
    with torch.no_grad():
        lengths = [len(f) for f in llavas.features_of(model, pixel_values=pixels, image_sizes=sizes)]
    rows = [[1, -lengths[0], 5, -lengths[1], 7], [1, -lengths[2], 8]]
    return {"rows": rows, "pixel_values": pixels, "image_sizes": sizes}


def _padded(rows: list[list[int]], pad: str) -> tuple[Tensor, Tensor]:
    made = llavas.prompt(*rows, pad=pad)
    return made["input_ids"], made["attention_mask"]


def videos() -> Iterator[tuple[str, Callable[[], dict[str, Tensor]]]]:
    """Names of cases of `vtoken.QuotaVideoModel`, and what computes them."""
    scores = [[0.1, 0.9, 0.4, 0.0], [0.5, 0.5, 0.2, 0.8]]
    for kind in builders.FAMILIES:
        model = builders.build(kind)
        for s, options in enumerate(SHARES):
            for pad in ("left", "right"):
                rows = [[3, builders.run(kind, 4), 7, 8, 9], [3, 4, builders.run(kind, 4), 7]]
                given = builders.prompt(kind, rows, pad) | builders.video_inputs(kind, [4, 4])
                ways = [] if pad == "right" else ["greedy", "beams"] if s == 1 else ["greedy"]
                quota = vtoken.QuotaVideoModel(model, **options)
                more = {"frame_scores": scores}
                yield f"{kind}.{s}.{pad}", lambda q=quota, g=given, w=ways, m=more: _of(q, g, w, m)


def beside() -> Iterator[tuple[str, Callable[[], dict[str, Tensor]]]]:
    """The same with an image in the prompt, several videos, scores of frames, and frames that the processor thinned."""
    scores = [[0.1, 0.9, 0.4, 0.0], [0.5, 0.5, 0.2, 0.8]]
    for kind in builders.FAMILIES:
        model = builders.build(kind)
        pixels, count = builders.image_inputs(kind)
        start = [builders.START] if kind in builders.QWEN else []
        rows = [
            [3, *start, [builders.IMAGE] * count, 8, builders.run(kind, 4), 9, builders.run(kind, 4), 7], [3, 4, 5],
        ]  # fmt: skip
        given = builders.prompt(kind, rows, "left") | builders.video_inputs(kind, [4, 4]) | pixels
        quota = vtoken.QuotaVideoModel(model, budget=[7, 0.5])
        yield f"{kind}.image", lambda q=quota, g=given: _of(q, g, ["greedy", "beams"], {"frame_scores": scores})
        if kind in builders.QWEN:
            frames = {"frame_scores": [0.1, 0.2, 0.9, 0.0, 0.4, 0.4, 0.3]}
            one = builders.one_video(kind)
            yield f"{kind}.frames", lambda q=quota, g=one, m=frames: _of(_with(q, 9), g, ["greedy"], m)
        if kind == "llama3":
            thinned = builders.thinned()
            told = {"frame_scores": [0.1, 0.9, 0.8, 0.2]}
            yield f"{kind}.thinned", lambda q=quota, g=thinned, m=told: _of(_with(q, 0.5), g, ["greedy"], m)


def _with(quota: Any, budget: float) -> Any:
    return vtoken.QuotaVideoModel(quota.model, budget=budget)


@torch.no_grad()
def main() -> None:
    """Write the files that are not there."""
    from safetensors.torch import save_file

    for path, cases in ((IMAGES, images()), (VIDEOS, videos()), (BESIDE, beside())):
        if path.exists():
            continue
        held = {f"{name}/{part}": value for name, run in cases for part, value in run().items()}
        small = {n: v.to(torch.int32) if v.dtype == torch.int64 else v for n, v in held.items()}
        save_file({n: v.detach().contiguous().clone() for n, v in small.items()}, path)
        print(path.name, len(held), path.stat().st_size)


if __name__ == "__main__":
    main()
