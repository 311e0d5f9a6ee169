"""One engine in a process of its own: a model that shortens its images, a few prompts with an image each, measured."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vtoken.accounting.prefill import kv_cache_bytes
from vtoken.core.config import MethodConfig
from vtoken.core.counts import num_tokens
from vtoken.errors import InputError, VTokenError
from vtoken.serving.check import check
from vtoken.serving.pruning import Pruning

#: Of the engine, where nothing else is said: no compiling, and every image is encoded.
OPTIONS: dict[str, Any] = {"enforce_eager": True, "enable_prefix_caching": False}
#: Memory for keys and values on a CPU, where vLLM would take a share of all there is.
_CPU_CACHE = 1 << 28


@dataclass(frozen=True)
class Trial:
    """What one engine did.

    Args:
        vllm: its version.
        image_tokens: placeholders of the image in the prompt.
        expected: how many `vtoken.num_tokens` says.
        prompt_tokens: length of the prompt.
        cache_bytes: keys and values of one such prompt.
        seconds: of all requests at once, the least of the rounds: wall time, or on a CPU, where others may be at work,
            CPU time of the process.
        tokens_per_second, requests_per_second: generated tokens and finished prompts, by that time.
        ids: what the first prompt was answered with.
    """

    vllm: str
    image_tokens: int
    expected: int
    prompt_tokens: int
    cache_bytes: int
    seconds: float
    tokens_per_second: float
    requests_per_second: float
    ids: tuple[int, ...]


def trial(
    folder: str | os.PathLike[str],
    settings: MethodConfig,
    image: str | os.PathLike[str] | tuple[int, int] = (336, 336),
    *,
    question: str = "What is shown here?",
    requests: int = 8,
    new: int = 32,
    rounds: int = 3,
    limit: float = 1200.0,
    options: Mapping[str, Any] | None = None,
) -> Trial:
    """Start vLLM's offline engine on a folder, let it answer prompts, stop it.

    Args:
        folder: a model as `save_pretrained` writes it, with tokenizer and processor.
        settings: of the method.
        image: a file, or (height, width) of random ones. Every request gets it moved by another pixel, so that all are
            encoded.
        question: what stands behind the image in every prompt.
        requests: how many prompts are answered at once.
        new: tokens that each is answered with.
        rounds: how often all are asked, each time with other images.
        limit: seconds after which the engine is given up.
        options: further arguments of `vllm.LLM`.

    Raises:
        VTokenError: if vLLM is not installed, or the engine fails, ends or gives no answer in time.
        ConfigError, UnsupportedModelError: as `vtoken.serving.check`.

    Example:
        found = trial("llava-1.5-7b", vtoken.VTCCLS(num_tokens=64), "cat.png", options={"dtype": "bfloat16"})
    """
    if importlib.util.find_spec("vllm") is None:
        raise VTokenError("vLLM is not installed in this environment; docs/serving.md 1 says how")
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is no folder with a model")
    here, there = multiprocessing.Pipe(duplex=False)
    job = (str(folder), settings, image, question, requests, new, rounds, dict(options or {}))
    process: Any = multiprocessing.get_context("spawn").Process(target=_apart, args=(there, job))
    process.start()
    there.close()
    try:
        if not here.poll(limit):
            os.killpg(process.pid, signal.SIGKILL)
            raise VTokenError(f"the engine gave no answer within {limit:g} s")
        found = here.recv()
    except EOFError:
        process.join()
        raise VTokenError(f"the engine's process ended by itself, status {process.exitcode}") from None
    finally:
        _end(process)
    if isinstance(found, Exception):
        raise found
    trial: Trial = found
    return trial


def _end(process: Any) -> None:
    """Wait for a process that has answered; one that does not end, with all that it started, is ended."""
    process.join(20 if process.exitcode is None else 0)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()


def _apart(there: Connection, job: tuple[Any, ...]) -> None:
    """The other process."""
    os.setsid()  # so that it ends with all that it starts
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that this process's time is the engine's
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        there.send(_measured(*job))
    except VTokenError as error:
        there.send(error)
    except Exception as error:  # of vLLM, whose exceptions may not travel
        there.send(VTokenError(f"the engine failed: {type(error).__name__}: {error}"))


def _measured(
    folder: str,
    settings: MethodConfig,
    image: Any,
    question: str,
    requests: int,
    new: int,
    rounds: int,
    options: dict[str, Any],
) -> Trial:  # fmt: skip
    import vllm
    from transformers import AutoConfig, AutoProcessor
    from vllm.platforms import current_platform

    config = AutoConfig.from_pretrained(folder)
    overrides = check(config, settings)
    picture = _picture(image)
    pruning = Pruning(config, settings)
    expected = num_tokens(pruning.model, img_size=_seen(AutoProcessor.from_pretrained(folder), picture))
    if current_platform.is_cpu():
        options.setdefault("kv_cache_memory_bytes", _CPU_CACHE)
    engine = vllm.LLM(model=folder, hf_overrides=overrides, **(OPTIONS | options))
    kind, _ = vllm.ModelRegistry.resolve_model_cls(overrides["architectures"], engine.llm_engine.model_config)
    prompt = f"{kind.get_placeholder_str('image', 1)} {question}"
    sampling = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    clock, seconds = time.process_time if current_platform.is_cpu() else time.perf_counter, list[float]()
    found: Any = None
    for i in range(rounds + 1):  # the first warms up
        images = [_moved(picture, i * requests + j) for j in range(requests)]
        asked = [{"prompt": prompt, "multi_modal_data": {"image": image}} for image in images]
        begin = clock()
        answered = engine.generate(asked, sampling, use_tqdm=False)
        seconds.append(clock() - begin)
        found = found or answered[0]
    least = min(seconds[1:])
    ids: Any = found.prompt_token_ids
    token = pruning.family.token_ids(pruning.model)["image"]
    element = engine.llm_engine.model_config.dtype.itemsize
    return Trial(
        vllm=vllm.__version__,
        image_tokens=sum(i == token for i in ids),
        expected=expected,
        prompt_tokens=len(ids),
        cache_bytes=kv_cache_bytes(config.get_text_config(), len(ids), element),
        seconds=least,
        tokens_per_second=requests * new / least,
        requests_per_second=requests / least,
        ids=tuple(found.outputs[0].token_ids),
    )


def _picture(image: Any) -> Any:
    """An image of the library PIL."""
    import numpy as np
    from PIL import Image

    if not isinstance(image, tuple):
        return Image.open(image).convert("RGB")
    noise = np.random.default_rng(0).integers(0, 256, (*image, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def _moved(picture: Any, by: int) -> Any:
    """The same picture, `by` pixels to the right."""
    from PIL import ImageChops

    return ImageChops.offset(picture, by, 0)


def _seen(processor: Any, picture: Any) -> tuple[int, int]:
    """Height and width in pixels, as the model will count them: resized by its processor, unless that cuts crops."""
    given = processor.image_processor(images=[picture], return_tensors="pt")
    if "image_grid_thw" in given:
        patch = int(processor.image_processor.patch_size)
        return int(given["image_grid_thw"][0, 1]) * patch, int(given["image_grid_thw"][0, 2]) * patch
    if "image_sizes" in given:
        height, width = (int(side) for side in given["image_sizes"][0])
        return height, width
    return int(given["pixel_values"].shape[-2]), int(given["pixel_values"].shape[-1])
