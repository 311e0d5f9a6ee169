"""Reading the attention of a tower whose blocks call it by the name in their settings, as all of transformers' do.

A view of one attention with a copy of its settings that name our function sees queries and keys as they are multiplied:
rotated, image by image or window by window. Nothing is written to the model.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from vtoken.core.patch import view
from vtoken.ops import received_row

NAME = "vtoken_watch"


class Watch:
    """What one run of a tower of packed patches says.

    Args:
        layers: blocks whose attention is read, ascending.
        keys: whether the keys of the last of them are kept.
        before: whether what enters the merger is.
    """

    def __init__(self, layers: Sequence[int], *, keys: bool, before: bool) -> None:
        self._rows: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self._wants = keys, before
        self._last = max(layers, default=-1)
        self._keys: Tensor | None = None
        self._before: Tensor | None = None

    def over(self, tower: Any) -> Any:
        """The tower whose chosen blocks report here."""
        maybe_install_capturing_hooks(tower)  # the host would install them anew on every stand-in
        keys_of = len(tower.blocks) - 1 if self._last < 0 else self._last
        blocks = [
            view(block, attn=self._attention(block.attn, i, keys=self._wants[0] and i == keys_of))
            if i in self._rows or (self._wants[0] and i == keys_of)
            else block
            for i, block in enumerate(tower.blocks)
        ]
        merger = _Reader(tower.merger, self._take_before) if self._wants[1] else tower.merger
        return view(tower, blocks=blocks, merger=merger)

    def _attention(self, attn: Any, layer: int, *, keys: bool) -> Any:
        parts: dict[str, Any] = {"qkv": _Reader(attn.qkv, None, self._take_keys)} if keys else {}
        if layer in self._rows:
            settings = copy.copy(attn.config)
            stock, settings._attn_implementation_internal = settings._attn_implementation, NAME
            parts |= {"config": settings, "_vtoken_watch": (self._rows[layer], stock)}
        made = view(attn, **parts)
        if keys:
            made.qkv.heads = int(attn.num_heads)
        return made

    def _take_keys(self, projected: Tensor, heads: int) -> None:
        self._keys = projected.detach().unflatten(1, (3, heads, -1))[:, 1].float().mean(1)

    def _take_before(self, rows: Tensor) -> None:
        self._before = rows

    def attention(self, group: int) -> Tensor | None:
        """Attention that tokens of `group` patches receive, [layers, tokens] float32 in the tower's order."""
        if not self._rows:
            return None
        rows = [torch.cat([row[0] for row in found]) for found in self._rows.values()]
        return torch.stack([row.to(rows[-1].device).unflatten(0, (-1, group)).mean(1) for row in rows])

    def keys(self, group: int) -> Tensor | None:
        """Means of keys over heads and patches, [tokens, D]."""
        return None if self._keys is None else self._keys.unflatten(0, (-1, group)).mean(1)

    def before(self, group: int) -> Tensor | None:
        """Means over patches of what enters the merger, [tokens, C0]."""
        return None if self._before is None else self._before.unflatten(0, (-1, group)).mean(1)


class _Reader:
    """Stands where a module stood; calls go to it and are read."""

    heads = 0

    def __init__(self, module: Any, before: Any = None, behind: Any = None) -> None:
        self._module, self._before, self._behind = module, before, behind

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._before is not None:
            self._before(x)
        out = self._module(x, *args, **kwargs)
        if self._behind is not None:
            self._behind(out, self.heads)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _watch(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any) -> Any:
    rows, stock = module._vtoken_watch
    rows.append(received_row(query, key, scale=options["scaling"]))
    own = sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(stock, own)(module, query, key, value, attention_mask, **options)


AttentionInterface.register(NAME, _watch)
