"""Real pictures with captions, small enough to train a CLIP on a CPU: handwritten digits, and garments on a canvas.

Both lie inside ordinary packages: the digits in scikit-learn's wheel (1797 pictures of 8 x 8 pixels, CC BY 4.0), the
garments in Debian's dataset-fashion-mnist (70 000 pictures of 28 x 28 pixels, MIT).
"""

from __future__ import annotations

import gzip
import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken.demo.clutter import DATA, draw_layout, paint, read_fashion_mnist
from vtoken.errors import ConfigError, VTokenError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GARMENTS = (
    "t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
CONTEXT = 8  # tokens of a caption, the end token and padding included

_SIDE = 64  # of the canvas on which a garment lies
_DIGITS_TRAIN = 1400


@dataclass(frozen=True)
class CaptionTask:
    """Pictures with captions, and the classes that a zero-shot test chooses from.

    Args:
        name: of the task.
        size, patch: sides in pixels of the pictures and of the patches that fit them.
        captions: token ids int64 [classes, CONTEXT] of every class's caption.
        vocabulary: how many token ids there are.
        draw: (batch, generator) -> training pictures float32 [batch, 3, size, size] in [-1, 1], and classes [batch].
        images, labels: test pictures [N, 3, size, size] and their classes [N].
    """

    name: str
    size: int
    patch: int
    captions: Tensor
    vocabulary: int
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    images: Tensor
    labels: Tensor


def tokenize(captions: list[str]) -> tuple[Tensor, int]:
    """Token ids int64 [N, CONTEXT], one per word, and the size of the vocabulary.

    0 is padding and the end token has the largest id, where open_clip's text tower looks for it.

    Raises:
        ConfigError: if a caption has too many words.
    """
    words = {word: number for number, word in enumerate(sorted(set(" ".join(captions).split())), 1)}
    rows = [[words[word] for word in caption.split()] + [len(words) + 1] for caption in captions]
    if max(map(len, rows)) > CONTEXT:
        raise ConfigError(f"a caption has {max(map(len, rows)) - 1} words; there is room for {CONTEXT - 1}")
    return torch.tensor([row + [0] * (CONTEXT - len(row)) for row in rows]), len(words) + 2


def digit_task() -> CaptionTask:
    """Handwritten digits scaled to 32 pixels, 64 patches, "a photo of the digit seven"; 1400 to train, 397 to test.

    Raises:
        ImportError: if scikit-learn is missing. VTokenError: if its file is missing or damaged.
    """
    pictures, labels = read_digits()
    pictures = F.interpolate(pictures[:, None], size=32, mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:_DIGITS_TRAIN], order[_DIGITS_TRAIN:]

    def draw(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = train[torch.randint(len(train), (batch,), generator=generator)]
        return pictures[chosen], labels[chosen]

    captions, vocabulary = tokenize([f"a photo of the digit {word}" for word in DIGITS])
    return CaptionTask("digits", 32, 4, captions, vocabulary, draw, pictures[test], labels[test])


def garment_task(folder: Path = DATA, pieces: int = 0, test: int = 2000) -> CaptionTask:
    """A garment at a random place of a grey canvas of 64 pixels, 64 patches, "a photo of a coat".

    Args:
        folder: of the Fashion-MNIST files.
        pieces: how many pieces cut out of other garments lie under it.
        test: how many test pictures.

    Raises:
        ConfigError, VTokenError: see `read_fashion_mnist`.
    """
    images, labels = read_fashion_mnist("train", folder)
    test_images, test_labels = read_fashion_mnist("test", folder)

    def canvases(images: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
        layout = draw_layout(chosen, len(images), generator, side=_SIDE, pieces=pieces)
        return paint(images, layout).expand(-1, 3, -1, -1)

    def draw(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (batch,), generator=generator)
        return canvases(images, chosen, generator), labels[chosen]

    fixed = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(test_images), generator=fixed)[:test]
    captions, vocabulary = tokenize([f"a photo of a {word}" for word in GARMENTS])
    return CaptionTask(
        "garments" if pieces == 0 else "clutter", _SIDE, 8, captions, vocabulary, draw,
        canvases(test_images, chosen, fixed), test_labels[chosen],
    )  # fmt: skip


def read_digits() -> tuple[Tensor, Tensor]:
    """All 1797 digits, float32 [N, 8, 8] in [-1, 1], and their values int64 [N]; scikit-learn is not imported.

    Raises:
        ImportError: if scikit-learn is missing. VTokenError: if its file is missing or damaged.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError('the digits lie in scikit-learn; install it with pip install "vtoken[demo]"')
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split()
        values = torch.tensor([[float(value) for value in line.split(",")] for line in lines])
        pictures, labels = values[:, :-1].view(-1, 8, 8) / 8 - 1, values[:, -1].long()
    except (OSError, EOFError, zlib.error, ValueError, RuntimeError) as error:
        raise VTokenError(f"{path} is missing or damaged ({error}); install scikit-learn anew") from error
    return pictures, labels


def small_clip(task: CaptionTask) -> Any:
    """An untrained open_clip CLIP for the task: image tower 48 wide, 2 blocks, 4 heads, text tower 32 wide, 1 block."""
    from open_clip.model import CLIP

    vision: Any = {"layers": 2, "width": 48, "head_width": 12, "patch_size": task.patch, "image_size": task.size}
    text: Any = {
        "context_length": CONTEXT, "vocab_size": task.vocabulary, "width": 32, "heads": 4, "layers": 1,
    }  # fmt: skip
    return CLIP(32, vision, text, output_dict=True)


@torch.inference_mode()
def zero_shot_accuracy(model: Any, task: CaptionTask) -> float:
    """Share of the test pictures whose nearest caption is that of their class; the model's mode is as before."""
    training = model.training
    model.eval()
    captions = model.encode_text(task.captions, normalize=True)
    found = [(model.encode_image(part, normalize=True) @ captions.T).argmax(-1) for part in task.images.split(200)]
    model.train(training)
    return float((torch.cat(found) == task.labels).float().mean())
