"""lmms-eval's model `vtoken`: a multimodal model of transformers that carries a method while it answers.

    python -m lmms_eval --model vtoken --tasks mme \
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=vtc_cls,keep_ratio=0.25

An exception ends the evaluation: nothing is scored that was not answered. `ReducedModel`, which lmms-eval loads, is
made when it is asked for: it derives from lmms-eval's own class, which need not be there otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from vtoken import checks
from vtoken.core.apply import apply, config_of
from vtoken.core.config import make_config
from vtoken.core.counts import num_tokens, plan_of
from vtoken.core.host import host_of
from vtoken.core.travel import restore
from vtoken.errors import ConfigError, InputError, VTokenWarning

#: In place of a method's name: what the checkpoint's own config names, and the plain model to compare with.
SAVED, PLAIN = "saved", "none"
_GREEDY = ("temperature", "top_p", "top_k")


class Answering:
    """A model loaded by name, with a method applied, for tasks that generate.

    Args:
        pretrained: name or folder of a checkpoint; model and processor are what its config says.
        method: name of a registered method, such as "vtc_cls"; "saved" applies what the checkpoint's own settings name,
            "none" nothing.
        batch_size: prompts in one call, padded on the left.
        max_batch_size: must be left out: batches have one size.
        device: by default the first GPU if there is one; with several processes, each its own.
        dtype: name of a torch dtype, or "auto": the checkpoint's.
        device_map, attn_implementation, revision: as `from_pretrained` takes them.
        settings: of the method.

    Raises:
        ConfigError: if no method is named, or its settings do not fit.
        UnsupportedModelError: if the model cannot carry it.
    """

    is_simple = False  # its requests hold messages
    task_dict: dict[str, Any]

    def __init__(
        self,
        pretrained: str,
        method: str = "",
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        device_map: str | None = None,
        attn_implementation: str | None = None,
        revision: str = "main",
        **settings: Any,
    ) -> None:
        from accelerate import Accelerator

        super().__init__()
        config = _config(method, settings)
        if max_batch_size is not None or not str(batch_size).isdigit():
            raise ConfigError(f"batch_size is one whole number, got {batch_size!r} (max_batch_size={max_batch_size!r})")
        self.batch_size = checks.whole("vtoken", "batch_size", int(batch_size), 1)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        several = self._world_size > 1
        self._device = self.accelerator.device if several or device is None else torch.device(device)
        options = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
        given = {name: value for name, value in options.items() if value is not None}
        model = transformers.AutoModelForImageTextToText.from_pretrained(pretrained, revision=revision, **given).eval()
        self.model: Any = model if device_map is not None else model.to(self._device)
        self.processor = transformers.AutoProcessor.from_pretrained(pretrained, revision=revision)
        self.processor.tokenizer.padding_side = "left"
        if config is not None:
            self._apply(config)

    def _apply(self, config: Any) -> None:
        """The method into the model; where it merges in the tower, the smaller token count into the processor."""
        if config == SAVED:
            restore(self.model)
        else:
            apply(self.model, config)
        carried: Any = config_of(self.model)
        merging = [c for c in (carried if isinstance(carried, tuple) else (carried,)) if c.part == "tower"]
        own = getattr(self.processor, "num_additional_image_tokens", None)
        if merging and own is not None:
            host = host_of(self.model)
            full = host.adapter.num_tokens(self.model, plan_of(host, {}, host.image_size()))
            self.processor.num_additional_image_tokens = own + num_tokens(self.model, merging) - full

    @property
    def device(self) -> torch.device:
        """Where prompts go."""
        return self._device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to every request, in their order.

        Raises:
            InputError: for videos and audio.
        """
        answers: dict[int, str] = {}
        for batch in _batches(requests, self.batch_size):
            asked = [requests[i].args for i in batch]
            found = self._answers([self._messages(*args) for args in asked], dict(asked[0][2]))
            answers.update(zip(batch, found, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _messages(self, context: str, doc_to_messages: Any, options: Any, doc: int, task: str, split: str) -> Any:
        return doc_to_messages(self.task_dict[task][split][doc])

    def _answers(self, prompts: list[Any], options: dict[str, Any]) -> list[str]:
        until = options.pop("until", [])
        texts = [self.processor.apply_chat_template(_told(p), add_generation_prompt=True) for p in prompts]
        images = [
            part["url"] for p in prompts for message in p for part in message["content"] if part["type"] == "image"
        ]
        inputs = self.processor(text=texts, images=images or None, padding=True, return_tensors="pt")
        inputs = inputs.to(self.device, self.model.dtype)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, **self._generation(options))
        rows = ids[:, inputs["input_ids"].shape[1] :]
        found = self.processor.batch_decode(rows, skip_special_tokens=True)
        for stop in [until] if isinstance(until, str) else until:
            found = [answer.split(stop)[0] if stop else answer for answer in found]
        return [answer.strip() for answer in found]

    def _generation(self, options: dict[str, Any]) -> dict[str, Any]:
        """A task's options as `generate` takes them."""
        known = vars(transformers.GenerationConfig())
        ignored = sorted(name for name in options if name not in known)
        if ignored:
            what = ", ".join(ignored)
            warnings.warn(f"the task's options {what} are not generate's and are ignored", VTokenWarning, stacklevel=2)
        kept = {name: value for name, value in options.items() if name in known}
        kept.setdefault("do_sample", bool(kept.get("temperature")))
        if not kept["do_sample"]:
            kept |= dict.fromkeys(_GREEDY)
        tokens = self.processor.tokenizer
        return {"pad_token_id": tokens.eos_token_id if tokens.pad_token_id is None else tokens.pad_token_id, **kept}

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not served."""
        raise NotImplementedError("lmms-eval's model vtoken generates; tasks scored by likelihood are not served")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not served."""
        raise NotImplementedError("lmms-eval's model vtoken answers one round; tasks of several are not served")


def __getattr__(name: str) -> Any:
    if name != "ReducedModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms

    globals()[name] = type(name, (Answering, lmms), {"__module__": __name__, "__doc__": Answering.__doc__})
    return globals()[name]


def _config(method: str, settings: dict[str, Any]) -> Any:
    """Settings of a method; SAVED; None for the plain model."""
    if not method:
        raise ConfigError(
            "model_args name no method: method=vtc_cls,keep_ratio=0.25 applies one, method=saved what the checkpoint's "
            "own settings name, method=none measures the plain model"
        )
    if method not in (SAVED, PLAIN):
        return make_config(method, settings)
    if settings:
        raise ConfigError(f"method={method} takes no settings, got {', '.join(settings)}")
    return SAVED if method == SAVED else None


def _batches(requests: Sequence[Any], size: int) -> Iterator[list[int]]:
    """Numbers of requests of the same options, so many at a time."""
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(repr(request.args[2]), []).append(number)
    for group in groups.values():
        yield from (group[first : first + size] for first in range(0, len(group), size))


def _told(messages: Any) -> list[dict[str, Any]]:
    """Messages as a chat template takes them."""
    kinds = {part["type"] for message in messages for part in message["content"]}
    if not kinds <= {"text", "image"}:
        raise InputError(f"lmms-eval's model vtoken takes text and images, got {', '.join(sorted(kinds))}")
    return [
        {**message, "content": [p if p["type"] == "text" else {"type": "image"} for p in message["content"]]}
        for message in messages
    ]
