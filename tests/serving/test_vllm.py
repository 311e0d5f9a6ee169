"""vtoken inside a real vLLM engine, which gives the ids of transformers with vtoken. Run by `make test-vllm`.

Engines live in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), but for the server and for what could hang.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: make test-vllm", allow_module_level=True)
# Read by vLLM when it is imported.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1"
)
import transformers
import vllm

import vtoken
from tests.serving import tiny
from vtoken.core.config import make_config

#: A model, a method in it, and how the engine is set; chunks are smaller than a prompt, and than two images.
ENGINES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava": ("llava", "vtc_cls", {"num_tokens": 8}),
    "llava-merged": ("llava", "visionzip", {"num_tokens": 8}),
    "llava_next": ("llava_next", "vtc_cls", {"num_tokens": 8, "newline": "all"}),
    "qwen2_vl": ("qwen2_vl", "divprune", {"num_tokens": 4, "space": "before"}),
    "qwen2_5_vl": ("qwen2_5_vl", "vtc_cls", {"num_tokens": 4, "scorer": "received"}),
    "qwen3_vl": ("qwen3_vl", "visionzip", {"num_tokens": 4}),
}
#: Where an image stands in a prompt, of Qwen-VL and of LLaVA.
PLACES = ("<|vision_start|> <|image_pad|> <|vision_end|>", "<image>")
SIZES = [(56, 56), (112, 84), (84, 140), (140, 56)]
ASKED: list[dict[str, Any]] = [{}, {"num_tokens": 3}, {"num_tokens": 5}, {"num_tokens": 999}, {"keep_ratio": 0.7}]
NEW = 10
Call = tuple[str, list[Any], dict[str, Any]]


def calls(kind: str, count: int = 20) -> list[Call]:
    """Prompts with no image, one or two, and what each asks for."""
    found: list[Call] = []
    for i in range(count):
        n = (1, 1, 2, 0, 1)[i % 5]
        sizes = [SIZES[0] if kind == "llava" else SIZES[(i + j) % 4] for j in range(n)]
        images = [tiny.image(100 + 2 * i + j, size) for j, size in enumerate(sizes)]
        found.append((tiny.prompt(kind, i, n), images, ASKED[3 * i % 5] if n else {}))
    return found


def loaded(folder: Path, settings: Any) -> Any:
    """transformers' model with the method."""
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return vtoken.apply(model, settings)


def reference(model: Any, folder: Path, wanted: list[Call]) -> list[list[int]]:
    """Ids of transformers with vtoken, one prompt at a time."""
    found = []
    for text, images, asked in wanted:
        given = processed(folder, text, images)
        with vtoken.budget(model, **asked):
            ids = model.generate(**given, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        found.append(ids[0, given["input_ids"].shape[1] :].tolist())
    return found


def processed(folder: Path, text: str, images: list[Any]) -> Any:
    """What the model's processor makes of a prompt."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    return processor(text=[text], return_tensors="pt", **({"images": images} if images else {}))


def request(text: str, images: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """The same prompt for vLLM."""
    found: dict[str, Any] = {"prompt": text}
    if images is not None and len(images):
        found["multi_modal_data"] = {"image": images}
    return found | ({"mm_processor_kwargs": {"vtoken": asked}} if asked else {})


def answers(engine: Any, requests: list[dict[str, Any]]) -> list[list[int]]:
    """Ids of an engine, all prompts at once."""
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    return [list(out.outputs[0].token_ids) for out in engine.generate(requests, sampling, use_tqdm=False)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {kind: tiny.save(kind, place / kind) for kind in tiny.KINDS}


@contextlib.contextmanager
def engine(folder: Path, settings: Any, images: int = 2, **options: Any) -> Iterator[Any]:
    """A small engine, gone afterwards; without settings, vLLM's own class."""
    overrides = {} if settings is None else vtoken.serving.check(folder, settings)
    made = vllm.LLM(
        model=str(folder), hf_overrides=overrides, dtype="float32", enforce_eager=True, max_model_len=256,
        max_num_seqs=8, kv_cache_memory_bytes=32 << 20, limit_mm_per_prompt={"image": images}, enable_mm_embeds=True,
        **options,
    )  # fmt: skip
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_gives_the_ids_of_transformers(name: str, folders: dict[str, Path]) -> None:
    kind, method, options = ENGINES[name]
    folder, settings, wanted = folders[kind], make_config(method, options), calls(kind)
    model = loaded(folder, settings)
    expected = reference(model, folder, wanted)
    assert len({tuple(ids) for ids in expected}) > 15  # images and budgets matter
    short = {} if kind == "llava_next" else {"max_num_batched_tokens": 24}
    with engine(folder, settings, **short) as made:
        requests = [request(*call) for call in wanted]
        assert answers(made, requests) == expected
        assert answers(made, requests[::-1]) == expected[::-1]  # from the prefix cache, in another batch
        assert [answers(made, [one])[0] for one in requests[:3]] == expected[:3]
        mixed = [*(ready(model, folder, call) for call in wanted), *requests[:4]]
        assert answers(made, mixed) == [*expected, *expected[:4]]
        _refused_and_answered(kind, made, requests[0], expected[0])


def ready(model: Any, folder: Path, call: Call) -> dict[str, Any]:
    """A request with rows that were made outside the engine."""
    text, images, asked = call
    if not images:
        return request(text, None, {})
    given = processed(folder, text, images)
    with vtoken.budget(model, **asked):
        return request(text, vtoken.serving.image_embeds(vtoken.encode_images(model, given), given), {})


def _refused_and_answered(kind: str, made: Any, good: dict[str, Any], expected: list[int]) -> None:
    """What is wrong is refused in front of the engine, which goes on."""
    flat, grid = kind.startswith("llava"), torch.tensor([[1, 4, 4]])
    text = f"{PLACES[flat]} w1"
    narrow = torch.zeros(1, 4, 32) if flat else {"image_embeds": torch.zeros(4, 32), "image_grid_thw": grid}
    wrong: list[tuple[Any, str]] = [(request(text, narrow, {}), "64|\\[rows, 192")]
    if flat:
        wrong.append((request(text, [torch.zeros(0, 64)], {}), "at least one row"))
    for asked, told in (
        ({"num_tokens": 0}, "num_tokens"), ({"tokens": 3}, "num_tokens per request"),
        ({"num_tokens": [3, 4]}, "one number"),
    ):  # fmt: skip
        wrong.append((good | {"mm_processor_kwargs": {"vtoken": asked}}, told))
    if not flat:
        rows = torch.zeros(2, 64 * (3 if kind == "qwen3_vl" else 1))
        whole = {"image_embeds": rows, "image_grid_thw": grid, "image_rows": torch.tensor([2])}
        for kept, told in (([0], "1 image_kept"), ([1, 4], "indices of an image's 4"), ([2, 1], "ascending")):
            wrong.append((request(text, whole | {"image_kept": torch.tensor(kept)}, {}), told))
        video = {"video": torch.zeros(4, 56, 56, 3).numpy()}
        wrong += [
            (request("w1 <|image_pad|>", [tiny.image(0)], {}), "ends in an image"),
            ({"prompt": "w1 <|video_pad|> w2", "multi_modal_data": video}, "video"),
        ]
    for bad, told in wrong:
        with pytest.raises(Exception, match=told):
            answers(made, [bad])
        assert answers(made, [good]) == [expected]


@pytest.mark.parametrize(("kind", "stock"), [("llava", True), ("qwen2_5_vl", False)])
def test_ready_rows_in_an_engine_without_a_tower(kind: str, stock: bool, folders: dict[str, Path]) -> None:
    """The tower may be on another machine. vLLM's own class wants one count for all."""
    folder, settings = folders[kind], vtoken.VTCCLS(num_tokens=8)
    wanted = [(text, images, {} if stock else asked) for text, images, asked in calls(kind, 10)]
    model = loaded(folder, settings)
    with engine(folder, None if stock else settings, images=0) as made:
        assert answers(made, [ready(model, folder, call) for call in wanted]) == reference(model, folder, wanted)


def test_settings_that_do_not_fit_are_refused_before_an_engine_starts(folders: dict[str, Path]) -> None:
    code = """
import json, sys, vllm
from vtoken.errors import VTokenError
for folder, name, settings, told in json.loads(sys.argv[1]):
    try:
        vllm.LLM(model=folder, hf_overrides={"architectures": [name], "vtoken": settings}, dtype="float32",
                 enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=32 << 20)
    except VTokenError as error:
        print("REFUSED" if told in str(error) else f"WRONG {error}")
"""
    cases = [
        ("llava", {"method": "vtc_cls", "num_tokens": 0}, "num_tokens"),
        ("llava", {"method": "pitome", "ratio": 0.9}, "cannot be served"),
        ("llava", {"num_tokens": 4}, 'names no "method"'),
        ("llava_next", {"method": "vtc_cls", "num_tokens": 4}, "newline='all'"),
        ("qwen2_5_vl", {"method": "cdpruner", "num_tokens": 4}, "reads the text"),
        ("qwen2_5_vl", {"method": "vtc_cls", "num_tokens": 4, "start_layer": 0}, "windows"),
    ]
    given = json.dumps([(str(folders[kind]), tiny.ARCHITECTURES[kind], *rest) for kind, *rest in cases])
    done = subprocess.run(
        [sys.executable, "-c", code, given], capture_output=True, text=True, timeout=240, check=False
    )  # fmt: skip
    assert done.stdout.split() == ["REFUSED"] * len(cases), done.stdout + done.stderr[-2000:]


def test_serve_check_counts_as_the_library(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    from vtoken.__main__ import main

    words = "--method divprune keep_ratio=0.25 --size 112 84 --requests 2 --new 4 --json --engine dtype=float32"
    options = f"{words} max_model_len=256 kv_cache_memory_bytes={32 << 20}".split()
    assert main(["serve-check", str(folders["qwen2_5_vl"]), *options]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [found[name]["image_tokens"] for name in ("whole", "short")] == [12, 3]
    assert found["whole"]["prompt_tokens"] - found["short"]["prompt_tokens"] == 9
    assert found["short"]["cache_bytes"] == found["short"]["prompt_tokens"] * 2 * 2 * 64 * 4


def test_a_tower_that_cannot_be_read_is_refused_when_the_engine_starts(folders: dict[str, Path]) -> None:
    """Unless the method reads nothing of it."""
    from types import SimpleNamespace as Given

    from vtoken.serving.pruning import Pruning
    from vtoken.serving.vllm.taps import refuse

    config = transformers.AutoConfig.from_pretrained(folders["llava"])
    reads, other = (Pruning(config, make_config(m, {"num_tokens": 4})).needs for m in ("vtc_cls", "divprune"))
    for compiled, mode, ranks, told in (
        (True, "weights", 1, "compile_mm_encoder"), (False, "data", 2, "mm_encoder_tp_mode"),
        (False, "data", 1, ""), (False, "weights", 2, ""),
    ):  # fmt: skip
        media = Given(mm_encoder_tp_mode=mode)
        made = Given(
            model_config=Given(get_multimodal_config=lambda media=media: media),
            parallel_config=Given(tensor_parallel_size=ranks),
            compilation_config=Given(compile_mm_encoder=compiled),
        )
        refuse(other, made)
        if told:
            with pytest.raises(vtoken.UnsupportedModelError, match=told):
                refuse(reads, made)
        else:
            refuse(reads, made)


def test_a_vllm_with_other_hooks_is_refused_in_words() -> None:
    from vtoken.serving.vllm.hooks import TESTED, need

    class Other:
        def embed(self, pixels: Any, sizes: Any) -> None: ...

    need(Other, "embed", "pixels", "sizes")
    for name, arguments, told in (("embed", ("pixels",), "takes .pixels, sizes"), ("encode", (), "encode is missing")):
        with pytest.raises(vtoken.UnsupportedModelError, match=told) as refused:
            need(Other, name, *arguments)
        assert TESTED[0] in str(refused.value)
    assert vllm.__version__.partition("+")[0] in TESTED


TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }} "
    "{% else %}PLACE {% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_server_gives_the_ids_of_transformers(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    kind, method, options = ENGINES[name]
    folder, settings, wanted = folders[kind], make_config(method, options), calls(kind)
    model = loaded(folder, settings)
    expected = reference(model, folder, wanted)
    place = PLACES[kind == "llava"]
    (tmp_path / "chat.jinja").write_text(TEMPLATE.replace("PLACE", place))
    with server(folder, settings, tmp_path) as url:
        assert [_asked_over_http(url, call, place) for call in wanted] == expected
        narrow: Any = {"image_embeds": _encoded(torch.zeros(4, 32))}
        rows: Any = ready(model, folder, wanted[0])["multi_modal_data"]["image"]
        if kind == "llava":
            narrow, rows = narrow["image_embeds"], _encoded(rows[0])
        else:
            narrow["image_grid_thw"] = _encoded(torch.tensor([[1, 4, 4]]))
            rows = {name: _encoded(value) for name, value in rows.items()}
        told = _refused(url, [{"type": "image_embeds", "image_embeds": narrow}, {"type": "text", "text": "w1"}], {})
        assert "64" in told
        assert "32" in told
        before, _, behind = wanted[0][0].partition(place)
        parts = [{"type": "text", "text": before}, {"type": "image_embeds", "image_embeds": rows}]
        assert _post(url, [*parts, {"type": "text", "text": behind}], {}) == expected[0]
        assert "num_tokens" in _refused(
            url, [{"type": "text", "text": "w1"}, _picture(wanted[0][1][0])], {"num_tokens": 0}
        )
        assert _asked_over_http(url, wanted[1], place) == expected[1]


@contextlib.contextmanager
def server(folder: Path, settings: Any, place: Path) -> Iterator[str]:
    """vLLM's HTTP server in processes of its own; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "m",
        "--hf-overrides", json.dumps(vtoken.serving.check(folder, settings)), "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "256", "--max-num-seqs", "4", "--kv-cache-memory-bytes", str(32 << 20), "--port", str(port),
        "--limit-mm-per-prompt", '{"image": 2}', "--enable-mm-embeds", "--trust-request-mm-kwargs", "--chat-template",
        str(place / "chat.jinja"), "--host", "127.0.0.1",
    ]  # fmt: skip
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(place / "log", "w") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while True:
            assert running.poll() is None, (place / "log").read_text()[-3000:]
            assert time.monotonic() < end, (place / "log").read_text()[-3000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            time.sleep(1)
        yield url
    finally:
        os.killpg(running.pid, signal.SIGTERM)
        try:
            running.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)


def _encoded(tensor: torch.Tensor) -> str:
    file = io.BytesIO()
    torch.save(tensor.contiguous(), file)
    return base64.b64encode(file.getvalue()).decode()


def _asked_over_http(url: str, call: Call, place: str) -> list[int]:
    text, images, asked = call
    texts, parts = text.split(place), []
    for i, piece in enumerate(texts):
        parts.append({"type": "text", "text": piece})
        if i < len(images):
            parts.append(_picture(images[i]))
    return _post(url, parts, asked)


def _picture(image: Any) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def _refused(url: str, parts: list[dict[str, Any]], asked: dict[str, Any]) -> str:
    """What the server says of a wrong request."""
    with pytest.raises(urllib.error.HTTPError) as told:
        _post(url, parts, asked)
    assert told.value.code == 400
    return told.value.read().decode()


def _post(url: str, parts: list[dict[str, Any]], asked: dict[str, Any]) -> list[int]:
    body: dict[str, Any] = {
        "model": "m", "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": NEW,
        "ignore_eos": True, "return_token_ids": True, "add_generation_prompt": False,
    }  # fmt: skip
    if asked:
        body["mm_processor_kwargs"] = {"vtoken": asked}
    sent = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(sent, timeout=60) as got:
        found: list[int] = json.load(got)["choices"][0]["token_ids"]
        return found
