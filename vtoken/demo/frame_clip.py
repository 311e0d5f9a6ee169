"""A small CLIP for frames of `vtoken.demo.videos`: the small video model's own tower, and captions of its frames.

It has what `vtoken.video.CLIPScorer` asks of an open_clip model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtoken.demo.captions import DIGITS
from vtoken.demo.questions import COUNTS
from vtoken.demo.scenes import CLOTHES, COLOURS, MOST, SMALL_KINDS
from vtoken.demo.videos import WEIGHTS, Facts
from vtoken.errors import ConfigError

CONTEXT = 12  # words of a text; the rest is cut off
PAD, UNKNOWN = 0, 1


def captions(facts: Facts) -> tuple[list[str], Tensor]:
    """Everything that may be said of a frame, and of which frames it is true.

    Args:
        facts: of the frames, int64 [N] by name, as in `Scenes`.

    Returns:
        K texts, and bool [N, K].
    """
    texts, true = list[str](), list[Tensor]()

    def say(text: str, where: Tensor) -> None:
        texts.append(text)
        true.append(where)

    garment, colour, digit = facts["garment"], facts["colour"], facts["digit"]
    say("a garment", garment >= 0)
    say("a tag", colour >= 0)
    say("a digit on a tag", colour >= 0)
    amounts = torch.stack([facts[name] for name in SMALL_KINDS])
    say("only a photograph", (garment < 0) & (colour < 0) & (amounts == 0).all(0))
    for g, cloth in enumerate(CLOTHES):
        say(f"a {cloth}", garment == g)
        say(f"the garment is a {cloth}", garment == g)
    for c, paint in enumerate(COLOURS):
        say(f"a {paint} tag", colour == c)
        say(f"there is a digit on the {paint} tag", colour == c)
        for g, cloth in enumerate(CLOTHES):
            say(f"a {cloth} and a {paint} tag", (colour == c) & (garment == g))
        for d, value in enumerate(DIGITS):
            say(f"the digit {value} on a {paint} tag", (colour == c) & (digit == d))
    for name, amount in zip(SMALL_KINDS, amounts, strict=True):
        say(f"small {name}", amount > 0)
        say(f"many small {name}", amount > 1)
        for n in range(1, MOST + 1):
            say(f"{COUNTS[n]} small {name}", amount == n)
    return texts, torch.stack(true, 1)


def words_of(text: str) -> list[str]:
    """Its words in small letters."""
    return re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower())


_NOTHING = torch.full((1,), -1)
_FACTS = dict.fromkeys(("garment", "colour", "digit", *SMALL_KINDS), _NOTHING)
WORDS = ("<pad>", "<unknown>", *sorted({word for text in captions(_FACTS)[0] for word in words_of(text)}))
_NUMBERS = {word: number for number, word in enumerate(WORDS)}


def tokenize(texts: list[str]) -> Tensor:
    """A number for every word, int64 [N, CONTEXT]; words of no caption have one in common."""
    rows = [[_NUMBERS.get(word, UNKNOWN) for word in words_of(text)][:CONTEXT] or [UNKNOWN] for text in texts]
    return torch.tensor([row + [PAD] * (CONTEXT - len(row)) for row in rows])


class FrameCLIP(nn.Module):
    """Frames and texts as vectors of one space.

    Args:
        tower: of transformers' CLIP, as the small video model has it; used as it is, never trained here.
        width: of the text encoder and of the vectors.
    """

    def __init__(self, tower: Any, width: int = 128) -> None:
        super().__init__()
        channels, heads = int(tower.config.hidden_size), 4
        self.tower = tower.requires_grad_(False)
        self.queries = nn.Parameter(torch.randn(1, 8, channels) * channels**-0.5)
        self.pooling = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.seeing = nn.Sequential(
            nn.Flatten(1), nn.Linear(8 * channels, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.words, self.places = nn.Embedding(len(WORDS), width), nn.Parameter(torch.zeros(CONTEXT, width))
        block = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.reading = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.writing = nn.Linear(width, width)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-5.0))

    def encode_image(self, pictures: Tensor) -> Tensor:
        """Vectors [N, width] of pictures [N, 3, 112, 112] in [-1, 1]."""
        return self.encode_patches(self.tower(pixel_values=pictures).last_hidden_state[:, 1:])

    def encode_patches(self, patches: Tensor) -> Tensor:
        """The same from what the tower says of the patches, [N, 196, C]."""
        patches = F.layer_norm(patches, patches.shape[-1:])
        found: Tensor = self.seeing(
            self.pooling(self.queries.expand(len(patches), -1, -1), patches, patches, need_weights=False)[0]
        )
        return found

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Vectors [N, width] of texts as `tokenize` numbers them."""
        empty = tokens == PAD
        read = self.reading(self.words(tokens) + self.places, src_key_padding_mask=empty)
        there = (~empty).to(read.dtype)[..., None]
        found: Tensor = self.writing((read * there).sum(1) / there.sum(1))
        return found

    def own_state(self) -> dict[str, Tensor]:
        """Its weights without the tower's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("tower.")}


def preprocess(image: Any) -> Tensor:
    """A pillow image of 112 x 112 pixels as [3, 112, 112] in [-1, 1]."""
    import numpy as np

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def load_frame_clip(tower: Any, path: Path | None = None) -> FrameCLIP:
    """The trained scorer in eval mode, float32; `examples/train_video.py` made its weights.

    Args:
        tower: of the small video model that lies beside it.
        path: of the safetensors file; None means the one in the repository.

    Raises:
        ConfigError: if there is no such file, or if its names are not this class's.
    """
    from safetensors.torch import load_file

    path = WEIGHTS / "scorer.safetensors" if path is None else path
    if not path.is_file():
        raise ConfigError(f"no {path}; it lies in the repository and comes from examples/train_video.py")
    clip = FrameCLIP(tower)
    missing, stray = clip.load_state_dict({name: v.float() for name, v in load_file(path).items()}, strict=False)
    if wrong := [name for name in missing if not name.startswith("tower.")] + stray:
        raise ConfigError(f"{path} is not what examples/train_video.py writes: {', '.join(wrong)}")
    return clip.eval()
