"""Kept sets, logits and generated ids are those of version 0.1, case by case (see frozen/make.py)."""

from __future__ import annotations

import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from tests.prompts.frozen import make  # noqa: E402

# Sums in another order, on another machine or release, move the last bits; a token that is another one moves far more.
LOGITS, SCORES = 2e-4, 2e-6


@pytest.mark.parametrize("what", ["images", "videos", "beside"])
@torch.no_grad()
def test_prompts_become_what_they_were(what: str) -> None:
    from safetensors.torch import load_file

    files = {"images": make.IMAGES, "videos": make.VIDEOS, "beside": make.BESIDE}
    path, cases = files[what], {"images": make.images, "videos": make.videos, "beside": make.beside}[what]
    held, seen = load_file(path), set()
    names = inspect.signature(transformers.Qwen2VLForConditionalGeneration.forward).parameters
    for name, run in cases():
        if what != "images" and name.startswith("qwen2_5") and "mm_encoder_outputs" not in names:
            seen |= {key for key in held if key.startswith(f"{name}/")}  # older releases step through time otherwise
            continue
        for part, value in run().items():
            key, whole = f"{name}/{part}", not value.is_floating_point()
            seen.add(key)
            assert value.shape == held[key].shape, key
            if whole:
                assert torch.equal(value.int(), held[key]), key
            else:
                assert float((value - held[key]).abs().max()) < (LOGITS if part == "logits" else SCORES), key
    assert seen == set(held)
