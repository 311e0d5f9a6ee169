"""Another attention function for one call of a module that takes it by the name in its settings, as transformers' do.

The call runs on a view of the module with a copy of its settings, which name the one function that is registered here.
It finds on the view what is to run: queries and keys as they meet, behind norms and rotation. Nothing is written to the
model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import AttentionInterface

_NAME = "vtoken"


def attending(attn: Any, function: Callable[..., Any]) -> dict[str, Any]:
    """What stands in a view of `attn`, whose attention is `function`.

    Args:
        attn: a module that asks transformers for its attention function by the name in its `config`.
        function: is called with the view, queries, keys and values [B, H, T, D], the mask and the named arguments of
            transformers' attention functions; returns [B, T, H, D] and the weights or None.
    """
    settings: Any = object.__new__(type(attn.config))  # a shallow copy, in a way that graphs of torch.compile know
    settings.__dict__.update(attn.config.__dict__)
    settings.__dict__["_attn_implementation_internal"] = _NAME
    return {"config": settings, "_vtoken_function": function}


def _run(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any) -> Any:
    return module._vtoken_function(module, query, key, value, attention_mask, **options)


AttentionInterface.register(_NAME, _run)
