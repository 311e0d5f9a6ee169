"""What goes along with one attention call and brings back what a method chooses by."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from vtoken.core.bound import changed
from vtoken.core.method import KeepAll
from vtoken.core.patch import forward_with
from vtoken.core.state import TokenState
from vtoken.core.watch import Reader, by_heads
from vtoken.errors import InputError
from vtoken.ops.merging.matching import summed_keys


class Tap(Reader):
    """Goes along with one attention call of a patched tower and holds what the blocks' method asks for.

    Args:
        state: of this forward.
        layer: of the block.
        removes: whether the block removes tokens, so that its method will ask for what it chooses by.
    """

    def __init__(self, state: TokenState, layer: int, *, removes: bool) -> None:
        self._state = state
        self._layer = layer
        self._wanted = state.method.metric if removes else "hidden"
        self.wants_keys = self._wanted == "key" or self._wanted == "key_concat"
        self.row = None if state.watch is None else state.watch.row(layer, state)
        self._cls: Tensor | None = None

    def attend(self, attn: Any, x: Tensor, **options: Any) -> Any:
        """Call the attention `attn` of the block on normed tokens [B, T, C], with this tap if it has anything to do."""
        if self.wants_keys or self.row is not None or self.acts_in(attn):
            if not getattr(attn, "_vtoken_takes_tap", False):
                raise changed(f"the attention of block {self._layer}", attn)
            return attn(x, vtoken_tap=self, **options)
        if options and getattr(attn, "_vtoken_adds_sizes", False) and self.has_sizes:
            return attn(x, vtoken_tap=self, **options)
        return attn(x, **options)

    def acts_in(self, attn: Any) -> bool:
        """Whether the method that `attn` carries must run because plain attention is not, to the bit, what it does."""
        attention, maps = self._state.attention, self._state.maps
        if attention is None or "_vtoken_method" not in attn.__dict__:
            return False
        return not attention.is_stock(self._layer) or maps is not None or self._wanted == "cls"

    @property
    def may_keep_all(self) -> bool:
        """Whether the block may turn out to remove nothing, so that its attention must be stock, to the bit."""
        return not self._state.method.exact

    @property
    def has_sizes(self) -> bool:
        """Whether tokens have merged before, so that a mask of the attention is the term of their sizes."""
        return self._state.slots[self._layer].size is not None

    @classmethod
    def alone(cls, attn: Any, tokens: int) -> Tap:
        """For an attention that is called by itself, outside a forward of its model."""
        state = TokenState(KeepAll(), attn._vtoken_prefix, track_anchor=False, track_dest=False,
                           attention=attn._vtoken_method)  # fmt: skip
        state.first = replace(state.first, embedded=tokens)
        state.slots = {attn._vtoken_index: state.first}
        return cls(state, attn._vtoken_index, removes=False)

    @classmethod
    def acting(cls, attn: Any, tap: Tap | None, tokens: int) -> Tap | None:
        """The tap by which the method of `attn` runs in this call; None if the host's own attention does.

        Args:
            tap: that came with the call; without one the attention is called by itself.
            tokens: that the call brings.
        """
        if tap is not None:
            return tap if tap.acts_in(attn) else None
        method = attn.__dict__.get("_vtoken_method")
        return None if method is None or method.is_stock(attn._vtoken_index) else cls.alone(attn, tokens)

    def run(
        self, attn: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, dropout: float
    ) -> Tensor:
        """What the method of `attn` does with queries, keys and values [B, H, T, D], as they meet: [B, H, T, D].

        Raises:
            InputError: if the attention that every token receives is to be read on the way.
        """
        method = attn._vtoken_method
        if self.row is not None and self.row.of_all and not method.is_stock(self._layer):
            raise InputError(
                f"block {self._layer} attends by a connectivity mask, and the attention that a patch receives from all "
                'others is read as if it did not; rank by the class token (scorer="cls"), or leave that block out of '
                "the method's `layers`"
            )
        cls = self._wanted == "cls"
        call = self._state.call(self._layer, scale=scale, mask=mask, dropout=dropout, wants_cls=cls)
        out: Tensor = method.attend(q, k, v, attn.predictor, call)
        self._cls = call.cls
        return out

    def metric(self, x: Tensor) -> Tensor:
        """What the method chooses by, [B, T, d]; `x` are the tokens that it will choose among."""
        if self._wanted == "hidden":
            return x
        if self._wanted == "cls":
            if self._cls is None:
                raise RuntimeError("the attention left no class row, so there is nothing to rank tokens by")
            return self._cls.detach().mean(1).unsqueeze(-1)
        if self.keys is None:
            raise RuntimeError("the attention never called its key norm, so there are no keys to compare tokens by")
        keys = self.keys if self.keys.dim() == 4 else by_heads(self.keys, self._made_by)
        if self._wanted == "key":
            return summed_keys(keys)
        return keys.detach().transpose(1, 2).flatten(2)


class TappedMixin:
    """An attention that shows its keys: its own forward runs with a tap behind the modules that make them."""

    _vtoken_takes_tap: ClassVar[bool] = True
    #: The norms or projections of keys and queries.
    _vtoken_keys: ClassVar[str] = "k_norm"
    _vtoken_queries: ClassVar[str] = "q_norm"
    #: The attribute that counts heads, of attentions without a `head_dim` whose keys are a projection [B, T, C].
    _vtoken_heads: ClassVar[str] = ""

    def forward(self: Any, *args: Any, vtoken_tap: Tap | None = None, **options: Any) -> Any:
        if vtoken_tap is None:
            return super().forward(*args, **options)  # type: ignore[misc]
        return forward_with(self, vtoken_tap.parts(self, self._vtoken_keys, self._vtoken_queries), *args, **options)


def stock_with(block: Any, stock: Callable[..., Any], name: str, x: Tensor, tap: Tap, **options: Any) -> Any:
    """The block's own forward; where its attention `name` carries a method, with the tap along."""
    attn = getattr(block, name)
    if not tap.acts_in(attn):
        return stock(x, **options)
    return tapped_forward(block, name, tap, x, **options)


def tapped_forward(block: Any, name: str, tap: Tap, *args: Any, **options: Any) -> Any:
    """The block's own forward, whose attention `name` is called with the tap."""
    attn = functools.partial(getattr(block, name), vtoken_tap=tap)
    return forward_with(block, {name: attn}, *args, **options)
