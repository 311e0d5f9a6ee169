"""vtoken inside vLLM: classes of models that shorten their own images. docs/serving.md 3.

vLLM finds `register` by the entry point `vllm.general_plugins` of this package; nothing else imports it.
"""

from __future__ import annotations

#: By model_type of a config: the class's name in vLLM's registry, and where it is. It is imported when a model asks.
SERVED = {
    "llava": ("VTokenLlavaForConditionalGeneration", "vtoken.serving.vllm.llava"),
    "llava_next": ("VTokenLlavaNextForConditionalGeneration", "vtoken.serving.vllm.llava"),
    "qwen2_vl": ("VTokenQwen2VLForConditionalGeneration", "vtoken.serving.vllm.qwen"),
    "qwen2_5_vl": ("VTokenQwen2_5_VLForConditionalGeneration", "vtoken.serving.vllm.qwen"),
    "qwen3_vl": ("VTokenQwen3VLForConditionalGeneration", "vtoken.serving.vllm.qwen"),
}


def register() -> None:
    """Tell vLLM the names; called once in each of its processes."""
    from vllm import ModelRegistry

    for name, module in SERVED.values():
        ModelRegistry.register_model(name, f"{module}:{name}")
