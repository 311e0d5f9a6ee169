"""The digits of scikit-learn with captions, and a CLIP small enough to train in seconds.

Source: docs/methods/attentive_clip.md 16.
"""

from __future__ import annotations

import math
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip import ClipLoss
from sklearn.datasets import load_digits
from torch import Tensor

import vtoken

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN, BATCH, STEPS, WARM_UP, RATE, DECAY = 1400, 64, 150, 20, 2e-3, 0.05


def load() -> tuple[Tensor, Tensor]:
    """Images [1797, 3, 32, 32] in [-1, 1] and labels, in a fixed random order."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(digits.target)[order]


def captions() -> Tensor:
    """Token ids [10, 8] of "a photo of the digit <word>", one per word; the end has the largest id, padding is 0."""
    texts = [["a", "photo", "of", "the", "digit", word] for word in WORDS]
    ids = {word: number for number, word in enumerate(sorted({word for text in texts for word in text}), 1)}
    return torch.tensor([[ids[word] for word in text] + [len(ids) + 1, 0] for text in texts])


def model_of(seed: int) -> Any:
    """Image tower 48 wide, 2 blocks, 64 patches; text tower 32 wide, 1 block."""
    torch.manual_seed(seed)
    vision = {"image_size": 32, "patch_size": 4, "width": 48, "layers": 2, "head_width": 12}
    text = {"context_length": 8, "vocab_size": 17, "width": 32, "heads": 4, "layers": 1}
    return open_clip.CLIP(32, vision, text, output_dict=True)


def zero_shot(wrapper: Any, images: Tensor, labels: Tensor) -> float:
    """Share of images whose own caption is the nearest of ten."""
    with torch.no_grad():
        wrapper.eval()
        texts = wrapper.encode_text(captions(), normalize=True)
        return float((wrapper.encode_image(images, normalize=True) @ texts.T).argmax(1).eq(labels).float().mean())


def train(seed: int, **options: Any) -> float:
    """Zero-shot accuracy on the held-out digits after 150 steps."""
    (images, labels), texts, loss = load(), captions(), ClipLoss()
    wrapper = vtoken.AttentiveMaskCLIP(model_of(seed), block=1, momentum=0.95, total_steps=STEPS, **options).train()
    learning = [p for p in wrapper.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    wrapper.attach_ema(optimizer)
    order = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - WARM_UP) / (STEPS - WARM_UP)))
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * (0.05 + 0.95 * cosine)
        chosen = torch.randint(TRAIN, (BATCH,), generator=order)
        optimizer.zero_grad()
        loss(**wrapper(images[chosen], texts[labels[chosen]])).backward()
        optimizer.step()
        with torch.no_grad():
            wrapper.logit_scale.clamp_(0, math.log(100))
    return zero_shot(wrapper, images[TRAIN:], labels[TRAIN:])
