"""Reading attention while an image tower runs, without asking it for attention maps.

A `Reader` goes along with one attention call. It stands behind the modules that make queries and keys, passes on what
they make and keeps what was asked for: keys for a method that compares tokens, or one row of scores for a `Watch`.
Nothing is left on the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from vtoken.core.slots import Slot
from vtoken.core.state import TokenState
from vtoken.core.visual import Needs
from vtoken.ops import class_row, received_row
from vtoken.ops import ensemble as as_one

#: What an attention does to queries and keys [B, H, T, D] in front of their product.
Rotation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Watch:
    """What the attention of chosen blocks says in one pass of images through a tower.

    Args:
        layers: indices of the blocks.
        scorer: "cls" (attention of the first token to every token) or "received" (attention that every token gets).
        keys: the block whose keys are kept, too; None: no block's.
        stop: whether blocks behind the last one that is read are left out; what the tower returns then means nothing.
        joined: whether images are packed, so that an attention may be called for some of them at a time: its rows are
            joined.
    """

    def __init__(
        self,
        layers: Collection[int],
        scorer: str = "cls",
        *,
        keys: int | None = None,
        stop: bool = False,
        joined: bool = False,
    ) -> None:
        #: The blocks that are read.
        self.layers = sorted(layers)
        self.stop = stop
        self.keys_of = keys
        #: Keys of that block in front of a rotation, mean over heads: [B, T, D], or [T, D] of packed images.
        self.keys: Tensor | None = None
        self._scorer = scorer
        self._joined = joined
        self._rows: dict[int, list[Tensor]] = {}
        #: Where every token went, if the tower merges tokens.
        self._state: TokenState | None = None
        #: Whether queries and keys were rotated in any of the blocks.
        self.rotated = False

    @classmethod
    def of(cls, needs: Needs, last: int, *, joined: bool = False) -> Watch:
        """For what a prompt method asks for; `last` is the block whose keys it means if it names none."""
        keys = (needs.layers[-1] if needs.layers else last) if "keys" in needs.features else None
        return cls(needs.layers, "cls" if needs.attention == "class" else "received", keys=keys, joined=joined)

    @property
    def reads(self) -> bool:
        """Whether anything is to be read."""
        return bool(self.layers) or self.keys_of is not None

    def row(self, layer: int, state: TokenState | None = None) -> Row | None:
        """What makes the row of block `layer`; None if there is nothing to read, or no longer.

        Activation checkpointing runs a block again, which changes nothing here.

        Args:
            state: of the forward, in a patched tower.
        """
        self._state = state
        if layer not in {*self.layers, self.keys_of} or (layer in self._rows and not self._joined):
            return None
        sizes = None if state is None else state.bias(layer, torch.float32)
        return Row(self._scorer, None if sizes is None else sizes[:, 0], functools.partial(self._keep, layer))

    def _keep(self, layer: int, row: Tensor, keys: Tensor | None, rotated: bool) -> None:
        self._rows.setdefault(layer, []).append(row)
        self.rotated |= rotated
        if layer == self.keys_of and keys is not None:
            self.keys = keys.mean(1)

    def scores(self, last: int, how: str) -> tuple[Tensor, Tensor | None]:
        """Scores of the rows that block `last` hands out, and the embedded row whose place each keeps.

        Args:
            how: the blocks' scores become one by "mean", "sum", "max" or "min".

        Returns:
            [B, T] float32, prefix tokens included; [B, T] int64, or None if no token was merged.
        """
        rows, anchor = self.each(last)
        return as_one([row.to(rows[-1].device) for row in rows], how), anchor

    def each(self, last: int) -> tuple[list[Tensor], Tensor | None]:
        """The same without becoming one: [B, T] for every block; of joined rows [1, T]."""
        slot = Slot() if self._state is None else self._state.slots[last + 1]
        if self._state is not None and self._state.method.order == "raster":
            slot = slot.raster()
        return [self._carried(layer, slot) for layer in self.layers], slot.anchor

    def _carried(self, layer: int, slot: Slot) -> Tensor:
        """One block's scores brought to the rows of `slot`: tokens that merged later pass on their sum."""
        if layer not in self._rows:
            raise RuntimeError(f"the attention of block {layer} never computed queries and keys: there are no scores")
        rows = self._rows[layer]
        row = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        if self._state is None or slot.dest is None or slot.anchor is None:
            return row
        was = self._state.slots[layer].anchor
        now = slot.dest if was is None else slot.dest.gather(1, was)
        return torch.zeros(slot.anchor.shape, dtype=row.dtype, device=row.device).scatter_add(1, now, row)


class Row:
    """Makes one row of scores of the queries and keys of one attention call, as soon as both have arrived.

    Args:
        scorer: as of `Watch`.
        bias: added to the logits of the keys, [B, 1, T].
        keep: is given the row [B, T] float32, the keys in front of a rotation (None where they are not shown) and
            whether queries and keys were rotated.
    """

    def __init__(self, scorer: str, bias: Tensor | None, keep: Callable[[Tensor, Tensor | None, bool], None]) -> None:
        self._score = class_row if scorer == "cls" else received_row
        self._bias = bias
        self._keep = keep
        #: Whether it is made of the attention of all tokens, not of the first one's alone.
        self.of_all = scorer != "cls"
        #: Set by the host where its attention rotates.
        self.rotate: Rotation | None = None
        self._q: Tensor | None = None
        self._k: Tensor | None = None
        self._done = False

    def queries(self, q: Tensor, scale: float) -> None:
        """Queries [B, H, T, D] and the factor on their logits have been made."""
        if not self._done:
            self._q = q[:, :, :1] if self._score is class_row and self.rotate is None else q
            self._finish(scale)

    def keys(self, k: Tensor, scale: float) -> None:
        """Keys [B, H, T, D] have been made; of grouped queries fewer heads."""
        if not self._done:
            self._k = k
            self._finish(scale)

    def meet(self, q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> None:
        """Queries and keys [B, H, T, D] are about to be multiplied, as they are.

        Args:
            bias: what is added to their product, broadcastable to [B, H, T, T], in place of that of the row.
        """
        if self._score is class_row:
            q, bias = q[:, :, 0], None if bias is None else bias[:, :, 0]
        self.found(self._score(q, k, scale=scale, bias=bias))

    def found(self, row: Tensor) -> None:
        """The row itself [B, T], where an attention shows neither queries nor keys."""
        if not self._done:
            self._done = True
            self._keep(row, None, False)

    def _finish(self, scale: float) -> None:
        if self._q is None or self._k is None:
            return
        q, k = (self._q, self._k) if self.rotate is None else self.rotate(self._q, self._k)
        if k.shape[1] != q.shape[1]:  # grouped queries
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        q = q[:, :, 0] if self._score is class_row else q
        self._keep(self._score(q, k, scale=scale, bias=self._bias), self._k, self.rotate is not None)
        self._done = True
        self._q = self._k = self._bias = None


class Reader:
    """Stands behind the modules of one attention that make queries and keys.

    Args:
        row: what makes a row of scores of them, if that is wanted.
    """

    #: Whether keys are to be kept.
    wants_keys: bool = False
    #: Keys as their module makes them, once the attention has run.
    keys: Tensor | None = None
    _made_by: Any = None

    def __init__(self, row: Row | None) -> None:
        self.row = row

    def parts(self, attn: Any, key: str, query: str) -> dict[str, Callable[[Tensor], Tensor]]:
        """What stands where the modules `key` and `query` of an attention stood: calls go to them and are read.

        They are projections that make [B, T, C], or norms of [B, H, T, D]. Queries are needed for a row only.
        """
        found: dict[str, Callable[[Tensor], Tensor]] = {}
        if self.row is not None:
            found[query] = functools.partial(self._query, attn, getattr(attn, query))
        found[key] = functools.partial(self._key, attn, getattr(attn, key))
        return found

    def _query(self, attn: Any, make: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        made = make(x)
        if self.row is not None:
            self.row.queries(by_heads(made.detach(), attn), _scale(attn))
        return made

    def _key(self, attn: Any, make: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        made = make(x)
        if self.wants_keys:
            self.keys, self._made_by = made, attn
        if self.row is not None:
            self.row.keys(by_heads(made.detach(), attn), _scale(attn))
        return made


def by_heads(x: Tensor, attn: Any) -> Tensor:
    """[B, H, T, D] of a projection [B, T, C], or as it is."""
    if x.dim() == 4:
        return x
    name = getattr(attn, "_vtoken_heads", "")
    return x.unflatten(2, (int(getattr(attn, name)), -1) if name else (-1, int(attn.head_dim))).transpose(1, 2)


def _scale(attn: Any) -> float:
    """The factor on the logits of an attention, by the names that libraries give it."""
    scale = getattr(attn, "scale", getattr(attn, "scaling", None))
    return float(attn.head_dim**-0.5 if scale is None else scale)
