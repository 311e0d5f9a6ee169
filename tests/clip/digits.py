"""The digits of scikit-learn with captions, and a CLIP small enough to train in seconds (attentive_clip.md 16)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import vtoken

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN, BATCH, STEPS, WARM_UP, RATE = 1400, 64, 150, 20, 2e-3
# Word-level ids: start, "a photo of the digit", a word for each digit, end, padding; the end has the largest id.
_HEAD, _END = [1, 2, 3, 4, 5, 6], 17


def load() -> tuple[Tensor, Tensor]:
    """Images [1797, 3, 32, 32] in [-1, 1] and labels, in scikit-learn's order: the last ones are of other writers."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    return images, torch.tensor(digits.target)


def captions(labels: Tensor) -> Tensor:
    """Token ids [B, 8] of "a photo of the digit <word>"."""
    head = torch.tensor(_HEAD).expand(len(labels), -1)
    return torch.cat([head, (7 + labels).unsqueeze(1), torch.full((len(labels), 1), _END)], 1)


def model_of(seed: int) -> Any:
    """Image tower 48 wide, 2 blocks, 64 patches; text tower 32 wide, 1 block."""
    torch.manual_seed(seed)
    vision = {"image_size": 32, "patch_size": 4, "width": 48, "layers": 2, "head_width": 12}
    text = {"context_length": 8, "vocab_size": 18, "width": 32, "heads": 4, "layers": 1}
    return open_clip.CLIP(32, vision, text, output_dict=True)


def zero_shot(wrapper: Any, images: Tensor, labels: Tensor) -> float:
    """Share of images whose own caption is the nearest of ten."""
    with torch.no_grad():
        wrapper.eval()
        texts = wrapper.encode_text(captions(torch.arange(10)), normalize=True)
        return float((wrapper.encode_image(images, normalize=True) @ texts.T).argmax(1).eq(labels).float().mean())


def batches(seed: int) -> Iterator[Tensor]:
    """Indices of training images, without end: a new order for every pass, its last incomplete batch left out."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(TRAIN, generator=rng).split(BATCH)[: TRAIN // BATCH]


def train(seed: int, **options: Any) -> float:
    """Zero-shot accuracy on the held-out digits after 150 steps."""
    images, labels = load()
    generator = torch.Generator().manual_seed(seed)
    wrapper = vtoken.AttentiveMaskCLIP(
        model_of(seed), block=1, momentum=0.95, total_steps=STEPS, generator=generator, **options
    ).train()
    optimizer = torch.optim.AdamW([p for p in wrapper.parameters() if p.requires_grad], lr=RATE, weight_decay=0.05)
    wrapper.attach_ema(optimizer)
    loss = vtoken.AttentiveMaskLoss()
    order = batches(seed)
    for step in range(STEPS):
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * max(0, step - WARM_UP) / (STEPS - WARM_UP))) / 2
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / WARM_UP, cosine)
        chosen = next(order)
        optimizer.zero_grad()
        loss(**wrapper(images[chosen], captions(labels[chosen]))).backward()
        optimizer.step()
        with torch.no_grad():
            wrapper.logit_scale.clamp_(0, math.log(100))
    return zero_shot(wrapper, images[TRAIN:], labels[TRAIN:])
