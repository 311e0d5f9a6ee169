"""Reading the attention of a tower whose blocks call it by the name in their settings, as all of transformers' do.

Queries and keys are seen as they are multiplied, image by image or window by window (`hosts/attending.py`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from vtoken.core.calling import call_with
from vtoken.errors import UnsupportedModelError
from vtoken.hosts.attending import attending
from vtoken.ops import class_row, received_row


class Watch:
    """What one run of a tower says.

    Args:
        layers: blocks whose attention is read, ascending.
        kind: "class" or "received".
        keys: the block whose keys are kept, or None.
    """

    def __init__(self, layers: Sequence[int], kind: str, keys: int | None = None) -> None:
        self._rows: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self._kind, self._keys_of = kind, keys
        #: What the module that makes keys gave, as it gave it.
        self.projected: Tensor | None = None

    @property
    def reads(self) -> bool:
        """Whether anything is to be read."""
        return bool(self._rows) or self._keys_of is not None

    def over(self, tower: Any, path: tuple[str, ...], attn: str, keys: str, **parts: Any) -> Any:
        """The tower with the chosen ones of its blocks, at the end of `path`, reporting here.

        Args:
            attn: attribute of a block that holds its attention.
            keys: attribute of the attention that makes keys.
            parts: what else takes the place of attributes of the tower.
        """
        maybe_install_capturing_hooks(tower)  # the host would install them anew on every stand-in
        return Exchanged(tower, self._within(tower, path, attn, keys) | parts)

    def _within(self, module: Any, path: tuple[str, ...], attn: str, keys: str) -> dict[str, Any]:
        name, *rest = path
        child = getattr(module, name)
        if rest:
            return {name: Exchanged(child, self._within(child, tuple(rest), attn, keys))}
        blocks: list[Any] = []
        for i, block in enumerate(child):
            heard = i in self._rows or i == self._keys_of
            blocks.append(Exchanged(block, {attn: self._attention(getattr(block, attn), i, keys)}) if heard else block)
        return {name: blocks}

    def _attention(self, attn: Any, layer: int, keys: str) -> Any:
        parts: dict[str, Any] = {}
        if layer == self._keys_of:
            parts[keys] = Reader(getattr(attn, keys), behind=self._take)
        if layer in self._rows:
            stock = attn.config._attn_implementation
            parts |= attending(attn, functools.partial(_watch, self._rows[layer], self._kind, stock))
        return Exchanged(attn, parts)

    def _take(self, rows: Tensor) -> None:
        self.projected = rows.detach()

    def attention(self) -> list[Tensor] | None:
        """Of every layer the rows [B, T] float32 of all calls of its attention, joined: [1, T] of packed images."""
        if not self._rows:
            return None
        if any(not rows for rows in self._rows.values()):
            raise RuntimeError("the attention of a block was never called by its name: there are no scores")
        return [rows[0] if len(rows) == 1 else torch.cat(rows, dim=1) for rows in self._rows.values()]


class Exchanged:
    """Stands where a module stood; a call is one of the module itself, with some of its attributes exchanged."""

    def __init__(self, module: Any, parts: dict[str, Any]) -> None:
        self._module, self._parts = module, parts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call_with(self._module, self._parts, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Reader:
    """Stands where a module stood; calls go to it, and what goes in or comes out is read."""

    def __init__(
        self,
        module: Any,
        before: Callable[[Tensor], None] | None = None,
        behind: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._module, self._before, self._behind = module, before, behind

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._before is not None:
            self._before(x)
        out = self._module(x, *args, **kwargs)
        if self._behind is not None:
            self._behind(out)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _watch(
    rows: list[Tensor], kind: str, stock: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any,
    **options: Any,
) -> Any:  # fmt: skip
    """The attention function that would have run, and the row of scores that is read."""
    scale, bias = options["scaling"], _bias(module, mask)
    if kind == "class":
        rows.append(class_row(query[:, :, 0], key, scale=scale, bias=None if bias is None else bias[:, :, 0]))
    else:
        rows.append(received_row(query, key, scale=scale, bias=bias))
    own = sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(stock, own)(module, query, key, value, mask, **options)


def _bias(module: Any, mask: Any) -> Tensor | None:
    """What a mask adds to logits, broadcastable to [B, H, T, T]; implementations are given it in forms of their own."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):  # a block mask of flex attention
        raise UnsupportedModelError(
            f"the attention of {type(module).__name__} cannot be read under its masks of type {type(mask).__name__}; "
            "set_attn_implementation('sdpa') on the image tower"
        )
    if mask.dim() == 2:  # flash attention's: which keys are there
        mask = mask[:, None, None, :] != 0
    if mask.dtype == torch.bool:
        lowest = torch.finfo(torch.float32).min
        return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill(~mask, lowest)
    return mask
