"""What a prompt costs a language model: multiply-adds of the prefill, bytes of the key-value cache.

Source: docs/methods/vtc_cls.md 13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtoken import checks
from vtoken.errors import ConfigError


@dataclass(frozen=True)
class Decoder:
    """The measures of a language model that its cost depends on.

    Args:
        layers: number of blocks.
        width: channels D.
        mlp_width: channels inside the gated MLP of three matrices.
        kv_width: channels of keys, and of values; D without grouped queries.
        q_width: channels of queries; None means D.
    """

    layers: int
    width: int
    mlp_width: int
    kv_width: int
    q_width: int | None = None

    @classmethod
    def of(cls, source: Any) -> Decoder:
        """The measures of a transformers model or configuration, of its language model if it is multimodal.

        Raises:
            ConfigError: if it does not tell them.
        """
        if isinstance(source, cls):
            return source
        config = getattr(source, "config", source)
        config = getattr(config, "text_config", config)
        try:
            heads = int(config.num_attention_heads)
            head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
            kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
            return cls(
                int(config.num_hidden_layers),
                int(config.hidden_size),
                int(config.intermediate_size),
                kv_heads * head_dim,
                None if heads * head_dim == config.hidden_size else heads * head_dim,
            )
        except AttributeError as error:
            raise ConfigError(
                f"cannot read a language model's measures from {type(source).__name__}: {error}"
            ) from None


def prefill_macs(decoder: Any, num_tokens: int, *, causal: bool = False) -> int:
    """Multiply-adds of one forward over `num_tokens` tokens, image and text together; the head is not counted.

    Args:
        decoder: a `Decoder`, or a transformers model or configuration.
        num_tokens: in the prompt.
        causal: count half of the attention, as every token sees only those before it.

    Example:
        >>> from vtoken.accounting.prefill import Decoder, prefill_macs
        >>> llama_7b = Decoder(layers=32, width=4096, mlp_width=11008, kv_width=4096)
        >>> round(prefill_macs(llama_7b, 576 + 60) / 1e12, 3)
        4.225
    """
    d = Decoder.of(decoder)
    num_tokens = checks.whole("prefill_macs", "num_tokens", num_tokens, 0)
    queries = d.width if d.q_width is None else d.q_width
    linear = 2 * d.width * queries + 2 * d.width * d.kv_width + 3 * d.width * d.mlp_width
    attention = num_tokens * num_tokens * queries * (1 if causal else 2)
    return d.layers * (num_tokens * linear + attention)


def prefill_flops(decoder: Any, num_tokens: int, *, causal: bool = False) -> int:
    """2 * prefill_macs. Many papers print the multiply-adds of the image tokens alone and call them FLOPs.

    Example:
        >>> import transformers, vtoken
        >>> few, many = (vtoken.prefill_flops(transformers.LlamaConfig(), n) for n in (100, 200))
        >>> many > 2 * few  # attention grows with the square
        True
    """
    return 2 * prefill_macs(decoder, num_tokens, causal=causal)


def kv_cache_bytes(decoder: Any, num_tokens: int, bytes_per_element: int = 2) -> int:
    """Bytes of the keys and values of `num_tokens` tokens; two bytes per element in half precision.

    Example:
        >>> import transformers, vtoken
        >>> vtoken.kv_cache_bytes(transformers.LlamaConfig(), 1000) // 2**20
        500
    """
    d = Decoder.of(decoder)
    num_tokens = checks.whole("kv_cache_bytes", "num_tokens", num_tokens, 0)
    bytes_per_element = checks.whole("kv_cache_bytes", "bytes_per_element", bytes_per_element, 1)
    return 2 * d.layers * d.kv_width * num_tokens * bytes_per_element
