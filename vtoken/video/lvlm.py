"""Frames scored by asking a vision-language model about each of them (docs/methods/quota.md 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vtoken import checks
from vtoken.accounting.prefill import prefill_flops
from vtoken.accounting.vision import tower_flops
from vtoken.errors import ConfigError
from vtoken.video.decouple import Clue
from vtoken.video.pictures import at_most, to_image
from vtoken.video.scorers import checked, evaluating

PROBABILITIES = ("pair", "full")


def frame_question(clue: Clue, yes: str = "A", no: str = "B") -> str:
    """What a model is asked about one frame.

    Raises:
        ConfigError: if it is given no clue.

    Example:
        >>> import vtoken
        >>> clue = vtoken.video.RuleDecoupler().decouple("Where is the red shoe?")
        >>> "red shoe" in vtoken.video.frame_question(clue)
        True
    """
    if not isinstance(clue, Clue):
        raise ConfigError(f"frame_question({clue!r}): must be a vtoken.video.Clue")
    asked = {
        "objects": f"Can any of these be seen in the picture: {', '.join(clue.items)}?",
        "event": f"Does the picture show this happening: {'; '.join(clue.items)}?",
        "query": f"Does the picture contain enough information to answer this question: {clue.text}",
    }[clue.kind]
    return f"{asked}\n{yes}. yes\n{no}. no\nAnswer with the letter only."


class LVLMScorer:
    """Probability that a vision-language model says yes when asked whether a frame shows what is looked for.

    Costs far more than the CLIP scorer: a 2B model at 720p takes about 13 TFLOPs a frame, more for 96 frames than the
    answer of a 7B model itself. `max_pixels` is the lever.

    Args:
        model: any transformers image-text-to-text model.
        processor: its processor, with a chat template.
        yes, no: the answers; each must be one token of the tokenizer.
        probability: "pair", P(yes) / (P(yes) + P(no)); or "full", P(yes) among all tokens (the published code).
        batch_size: frames per forward pass.
        template: from a clue to the question; None for `frame_question`.
        max_pixels: larger frames are scaled down first; None leaves it to the processor.

    Raises:
        ConfigError: if an option is unknown, or an answer is not exactly one token.

    Source: arXiv 2503.08689 section 3.2; the wording is our own.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        yes: str = "A",
        no: str = "B",
        probability: str = "pair",
        batch_size: int = 8,
        template: Callable[[Clue], str] | None = None,
        max_pixels: int | None = None,
    ) -> None:
        checks.choice("LVLMScorer", "probability", probability, PROBABILITIES)
        batch_size = checks.whole("LVLMScorer", "batch_size", batch_size, 1)
        if max_pixels is not None:
            max_pixels = checks.whole("LVLMScorer", "max_pixels", max_pixels, 1)
        if not callable(model) or not hasattr(processor, "apply_chat_template"):
            raise ConfigError(
                f"LVLMScorer takes a transformers model and its processor with a chat template, got "
                f"{type(model).__name__} and {type(processor).__name__}"
            )
        if template is not None and not callable(template):
            raise ConfigError(f"LVLMScorer(template={template!r}): must be a function from a clue to the question")
        self.model, self.processor = model, processor
        self.answers = (_one_token(processor, yes), _one_token(processor, no))
        if self.answers[0] == self.answers[1]:
            raise ConfigError(f"yes={yes!r} and no={no!r} are the same token {self.answers[0]}")
        self.probability, self.batch_size, self.max_pixels = probability, batch_size, max_pixels
        self.template = template or (lambda clue: frame_question(clue, yes, no))

    def score(self, frames: Sequence[Any], clue: Clue) -> Tensor:
        """Scores [T], float32 on the CPU."""
        question = self.template(clue)
        found = [torch.zeros(0)]
        with evaluating(self.model):
            for start in range(0, len(frames), self.batch_size):
                batch = [at_most(to_image(f), self.max_pixels) for f in frames[start : start + self.batch_size]]
                logits = self.model(**self._inputs(batch, question), logits_to_keep=1).logits[:, -1].float()
                found.append(self._probability(logits).cpu())
        return checked(torch.cat(found), len(frames), "LVLMScorer")

    def flops(self, frames: Sequence[Any], clue: Clue) -> int | None:
        """FLOPs of tower and prefill on every frame's own prompt, padding not counted; None if sizes cannot be read.

        Runs the processor on the frames, but no model.
        """
        question, total = self.template(clue), 0
        for frame in frames:
            inputs = self._inputs([at_most(to_image(frame), self.max_pixels)], question)
            patches = _patches(self.model, inputs)
            if patches is None:
                return None
            total += sum(tower_flops(self.model, n) for n in patches)
            total += prefill_flops(self.model, int(inputs["input_ids"].shape[1]), causal=True)
        return total

    def _inputs(self, images: Sequence[Any], question: str) -> Any:
        """One conversation of one user turn per image, padded on the left: the last position is the answer's."""
        turns = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
            for image in images
        ]
        made = self.processor.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "padding_side": "left", "return_tensors": "pt"},
        )
        return made.to(self.model.device, self.model.dtype)  # the dtype is for floating tensors only

    def _probability(self, logits: Tensor) -> Tensor:
        shares = logits.softmax(-1) if self.probability == "full" else logits[:, list(self.answers)].softmax(-1)
        return shares[:, self.answers[0]] if self.probability == "full" else shares[:, 0]


def _patches(model: Any, inputs: Any) -> list[int] | None:
    """Patches of every run of attention in the tower: of each crop, or of each image of its own size."""
    if "image_grid_thw" in inputs:
        return [int(t * h * w) for t, h, w in inputs["image_grid_thw"].tolist()]
    patch = getattr(model.config.vision_config, "patch_size", None)
    pixels = inputs["pixel_values"]
    if not isinstance(patch, int) or pixels.dim() < 4:
        return None
    height, width = pixels.shape[-2:]
    return [(height // patch) * (width // patch)] * pixels.shape[:-3].numel()


def text_generator(model: Any, processor: Any, *, max_new_tokens: int = 128) -> Callable[[str], str]:
    """A function from a prompt to the model's greedy reply, without images; for `CoTDecoupler`.

    Args:
        model: any transformers model that generates.
        processor: its processor or tokenizer, with a chat template whose turns are plain text or lists of parts.
        max_new_tokens: at most.
    """

    def generate(prompt: str) -> str:
        content: Any
        options: dict[str, Any]
        if _tokenizer(processor) is processor:
            content, options = prompt, {"return_tensors": "pt"}
        else:
            content, options = [{"type": "text", "text": prompt}], {"processor_kwargs": {"return_tensors": "pt"}}
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **options,
        ).to(model.device)
        with evaluating(model):
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        reply: str = _tokenizer(processor).decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return reply

    return generate


def _tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def _one_token(processor: Any, answer: str) -> int:
    ids: list[int] = list(_tokenizer(processor).encode(answer, add_special_tokens=False))
    if len(ids) != 1:
        raise ConfigError(f"the answer {answer!r} is {len(ids)} tokens {ids} of this tokenizer; it must be exactly one")
    return ids[0]
