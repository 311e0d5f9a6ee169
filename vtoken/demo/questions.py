"""Questions in words about the pictures of `vtoken.demo.scenes`, and their true answers.

Every answer is one word of a small vocabulary, whose words are the tokens. In a prompt the image comes first, then one
or two turns; the answer follows the question mark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtoken.demo.captions import DIGITS
from vtoken.demo.scenes import CLOTHES, COLOURS, MOST, SMALL_KINDS, Scenes
from vtoken.errors import ConfigError

WEIGHTS = Path(__file__).parents[2] / "examples" / "weights" / "small_llava"
COUNTS = ("none", "one", "two", "three")
PLACES = (
    "top-left", "top", "top-right", "left", "centre", "right", "bottom-left", "bottom", "bottom-right",
)  # fmt: skip
IGNORED = -100  # label of a position that answers nothing


@dataclass(frozen=True)
class Turn:
    """A question, `{}` standing for a kind of small garment, and the fact (see `Scenes`) that answers it."""

    question: str
    fact: str


# The kinds of questions. The last answer counts; the one before it is given.
KINDS = {
    "object": (Turn("what is the garment ?", "garment"),),
    "place": (Turn("where is the garment ?", "garment place"),),
    "count": (Turn("how many small {} ?", "{}"),),
    "colour": (Turn("what colour is the tag ?", "colour"),),
    "digit": (Turn("what digit is on the tag ?", "digit"),),
    "object, then place": (Turn("what is the garment ?", "garment"), Turn("where is it ?", "garment place")),
    "digit, then place": (Turn("what digit is on the tag ?", "digit"), Turn("where is it ?", "tag place")),
}
ANSWERS = {
    "garment": CLOTHES, "garment place": PLACES, "tag place": PLACES, "colour": tuple(COLOURS), "digit": DIGITS,
    **dict.fromkeys(SMALL_KINDS, COUNTS),
}  # fmt: skip
assert len(COUNTS) == MOST + 1

PAD, BEGIN, END, IMAGE = "<pad>", "<s>", "</s>", "<image>"
_ASKED = {word for turns in KINDS.values() for turn in turns for word in turn.question.split()} - {"{}"}
_WORDS = _ASKED.union(SMALL_KINDS, *ANSWERS.values())
VOCABULARY = (PAD, BEGIN, END, IMAGE, *sorted(_WORDS))
IDS = {word: number for number, word in enumerate(VOCABULARY)}


def ask(kind: str, scenes: Scenes, which: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The conversation of one kind about every picture, as it stands behind the image.

    Args:
        kind: of `KINDS`.
        scenes: N of them.
        which: of "count", the kinds of small garments that are asked for, int64 [N] into `SMALL_KINDS`.

    Returns:
        Token ids int64 [N, L], the last answer included, and what follows at each position, int64 [N, L]: an answer at
        a question mark, the end token at the last answer, else -100; -100 everywhere if the picture has no answer.
    """
    count = len(scenes.pictures)
    which = torch.zeros(count, dtype=torch.long) if which is None else which
    names = list(SMALL_KINDS)
    ids, labels, known = list[Tensor](), list[Tensor](), torch.ones(count, dtype=torch.bool)
    for turn in KINDS[kind]:
        for word in turn.question.split():
            row = [IDS[name] for name in names] if word == "{}" else [IDS[word]] * len(names)
            ids.append(torch.tensor(row)[which])
        facts = [turn.fact.format(name) for name in names]
        values = torch.stack([scenes.facts[fact] for fact in facts], 1).gather(1, which[:, None])[:, 0]
        answer = torch.tensor([IDS[word] for word in ANSWERS[facts[0]]])[values.clamp(min=0)]
        known &= values >= 0
        labels += [torch.full((count,), IGNORED)] * (len(ids) - len(labels) - 1) + [answer]
        ids.append(answer)
    labels.append(torch.full((count,), IDS[END]))
    return torch.stack(ids, 1), torch.where(known[:, None], torch.stack(labels, 1), IGNORED)


def side_by_side(
    model: Any, features: Tensor, texts: Sequence[Tensor], places: Tensor | None = None, whole: int | None = None
) -> list[Tensor]:
    """Logits of several conversations about the same pictures, in one pass of a LLaVA's language model.

    All see the image in front of them and none sees another, so each is answered as if it were alone.

    Args:
        model: a LLaVA of transformers with this vocabulary.
        features: of the images as they stand in the prompt, [N, K, D].
        texts: token ids int64 [N, L] of every conversation.
        places: what the images' tokens are numbered by, int64 [N, K] from 0 on; None: one after the other.
        whole: behind how many image tokens the texts are numbered; None: K.

    Returns:
        [N, L, vocabulary] for every conversation.
    """
    count, front = len(features), 1 + features.shape[1]
    lengths = [ids.shape[1] for ids in texts]
    owner = torch.cat([torch.full((n,), i) for i, n in enumerate([front, *lengths])]).to(features.device)
    image = torch.arange(front - 1).expand(count, -1) if places is None else places.cpu()
    behind = front if whole is None else 1 + whole
    words = torch.cat([behind + torch.arange(n) for n in lengths]).expand(count, -1)
    numbers = torch.cat([torch.zeros(count, 1, dtype=torch.long), 1 + image, words], 1).to(features.device)
    order = torch.arange(len(owner), device=features.device)
    seen = (order[:, None] >= order) & ((owner[:, None] == owner) | (owner == 0))
    table = model.get_input_embeddings()
    begin = table(torch.full((count, 1), IDS[BEGIN], device=features.device))
    embeds = torch.cat([begin, features.to(begin.dtype), table(torch.cat(list(texts), 1))], 1)
    mask = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, torch.finfo(torch.float32).min)
    out = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask.to(embeds.dtype)[None, None].expand(count, 1, -1, -1),
        position_ids=numbers, use_cache=False,
    )  # fmt: skip
    return list(model.lm_head(out.last_hidden_state[:, front:]).split(lengths, 1))


def prompt(ids: Tensor, image_tokens: int) -> Tensor:
    """Token ids [N, 1 + image_tokens + L] of prompts whose text [N, L] stands behind an image."""
    begin, image = ids.new_full((len(ids), 1), IDS[BEGIN]), ids.new_full((len(ids), image_tokens), IDS[IMAGE])
    return torch.cat([begin, image, ids], 1)


def load_small_llava(folder: Path | None = None) -> Any:
    """The trained LLaVA in eval mode, float32, on the CPU; `examples/train_llava.py` made its weights.

    Args:
        folder: what `from_pretrained` takes; None means the one in the repository.

    Raises:
        ConfigError: if there is no such folder. ImportError: if transformers is missing.
    """
    return load_trained("LlavaForConditionalGeneration", folder or WEIGHTS, "examples/train_llava.py")


def load_trained(name: str, folder: Path, script: str) -> Any:
    """The model of transformers' class `name` that lies in `folder` and that `script` made; see `load_small_llava`."""
    import transformers

    if not (folder / "config.json").is_file():
        raise ConfigError(f"no model in {folder}; it lies in the repository and comes from {script}")
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
