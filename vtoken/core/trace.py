"""A record of what a forward did; made only while a caller asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtoken import checks
from vtoken.core.carried import unapplied
from vtoken.core.records import AttentionRecord, PromptRecord, VideoRecord
from vtoken.core.slots import DROPPED
from vtoken.core.state import TokenState
from vtoken.errors import InputError, ShapeError, VTokenError
from vtoken.ops.rows import take_rows

MAPS = ("mask", "scores", "attention")
_EMPTY = "the trace holds no forward; get one from vtoken.trace(model, images) or vtoken.tracing(model)"


@dataclass(eq=False)
class Trace:
    """What the latest recorded forward did to the tokens. Rows are counted in raster order, prefix tokens first.

    Args:
        num_forwards: forwards recorded so far; the fields below describe the latest one.
        num_prefix: prefix tokens P.
        tokens: T before block 0 and after every block.
        dest: output row of every embedded row, [B, T0] int64 (the group map).
        layer_dest: the same after every block.
        size: patches per output token, [B, T'] float32.
        anchor: embedded row whose place each output row keeps, [B, T'] int64.
        layer_anchor: the same after every block.
        grid: patch rows and columns of the images, if the host told.
        prompt: which image tokens reached the language model, if a method acts there.
        video: what the frames of videos were given, if a `vtoken.QuotaVideoModel` ran.
        dropped: whether tokens were pruned away; their rows in `dest` are -1.
        attention: what every attention with a connectivity mask did, in the order of the blocks.
        maps: the attention maps that were asked for: "mask", "scores", "attention".
    """

    num_forwards: int = 0
    num_prefix: int = 0
    tokens: list[int] = field(default_factory=list)
    dest: Tensor | None = None
    layer_dest: list[Tensor] = field(default_factory=list)
    size: Tensor | None = None
    anchor: Tensor | None = None
    layer_anchor: list[Tensor] = field(default_factory=list)
    grid: tuple[int, int] | None = None
    prompt: PromptRecord | None = None
    video: VideoRecord | None = None
    dropped: bool = False
    attention: list[AttentionRecord] = field(default_factory=list)
    maps: frozenset[str] = frozenset()
    #: Attention modules of a network of the user's own that ran in the latest forward.
    _ran: list[nn.Module] = field(default_factory=list)

    def record(self, state: TokenState) -> None:
        """Take over what `state` knows after a forward."""
        if state.embedded is None:
            return
        batch, num_tokens, device = state.embedded
        rows = torch.arange(num_tokens, device=device).expand(batch, num_tokens)
        slots = [state.slots[i].raster() for i in sorted(state.slots)]
        self.num_forwards += 1
        self.num_prefix = state.num_prefix
        self.grid = state.grid
        self.attention = list(state.records)  # checkpointing adds to the state's own when it runs blocks again
        self.dropped = slots[-1].dropped
        self.layer_dest = [rows if s.dest is None else s.dest for s in slots[1:]]
        self.layer_anchor = [rows if s.anchor is None else s.anchor for s in slots[1:]]
        self.tokens = [num_tokens if s.anchor is None else s.anchor.shape[1] for s in slots]
        last = slots[-1]
        self.dest = rows if last.dest is None else last.dest
        self.anchor = rows if last.anchor is None else last.anchor
        self.size = (
            torch.ones(self.anchor.shape, dtype=torch.float32, device=device) if last.size is None else last.size
        )

    def record_attention(self, module: nn.Module, state: TokenState) -> None:
        """Take over what one attention of a network of the user's own did; where it ran before, a forward begins."""
        if not self._ran or module in self._ran:
            self._ran = [module]
            self.record(state)
            return
        for record in state.records:
            record.layer = len(self._ran)
        self._ran.append(module)
        self.attention += state.records
        assert state.embedded is not None
        batch, num_tokens, device = state.embedded
        rows = torch.arange(num_tokens, device=device).expand(batch, num_tokens)
        self.tokens.append(num_tokens)
        self.layer_dest.append(rows)
        self.layer_anchor.append(rows)

    def record_prompt(self, record: PromptRecord) -> None:
        """Take over what a method did to the image tokens of a prompt."""
        self.num_forwards += self.dest is None  # else the tower has counted this forward
        self.prompt = record
        self.grid = record.grid or self.grid

    def record_video(self, record: VideoRecord) -> None:
        """Take over what became of the videos in a prompt."""
        self.num_forwards += self.dest is None and self.prompt is None  # else it has been counted
        self.video = record

    def kept(self, index: int = 0, layer: int | None = None) -> Tensor:
        """Patches of image `index` whose own token is left, [K] int64, ascending, counted in raster order from 0.

        After block `layer`, None: the last one, or what reached the language model. A merging method's other patches
        live on in these; a pruning method's are gone.
        """
        if self.prompt is not None and layer is None:
            return self.prompt.patches(index)
        anchor = self.anchor if layer is None else self.layer_anchor[layer]
        if anchor is None:
            raise ShapeError(_EMPTY)
        return anchor[index, self.num_prefix :] - self.num_prefix


def unmerge(features: Tensor, trace: Trace, *, layer: int | None = None) -> Tensor:
    """Spread merged token features back over all embedded tokens.

    Args:
        features: rows [B, T', C] in raster order, as `forward_features` of a merged model returns them.
        trace: the record of the forward that made them.
        layer: the block that they left; None means the last one.

    Returns:
        Rows [B, T0, C]: every patch has its group's value, prefix tokens their own.

    Raises:
        ShapeError: if the features do not belong to that forward.
        InputError, ConfigError: if they are no tensor, or the model has no such layer.

    Example:
        >>> import timm, torch, vtoken
        >>> model = timm.create_model("test_vit").eval()
        >>> model = vtoken.apply(model, "tome", r=8)
        >>> with vtoken.tracing(model) as record:
        ...     features = model.forward_features(torch.randn(1, 3, 160, 160))
        >>> vtoken.unmerge(features, record).shape
        torch.Size([1, 101, 64])
    """
    if not isinstance(trace, Trace):
        raise InputError(f"unmerge(trace=...): must be a vtoken.Trace, got {type(trace).__name__}")
    if trace.dest is None:
        raise ShapeError(_EMPTY)
    depth = len(trace.layer_dest)
    if layer is not None:
        layer = checks.whole("unmerge", "layer", layer, -depth, depth - 1) % depth
    dest = trace.dest if layer is None else trace.layer_dest[layer]
    checks.tensor("unmerge", "features", features)
    count = trace.tokens[-1] if layer is None else trace.tokens[layer + 1]
    if features.dim() != 3 or features.shape[0] != dest.shape[0] or features.shape[1] != count:
        raise ShapeError(f"expected features [{dest.shape[0]}, {count}, C], got {tuple(features.shape)}")
    if trace.dropped:
        raise ShapeError(DROPPED)
    return take_rows(features, dest)


_active: ContextVar[tuple[tuple[nn.Module, Trace], ...]] = ContextVar("vtoken_traces", default=())


def current_trace(model: nn.Module) -> Trace | None:
    """The record that a caller of `model`, in this thread, asked for."""
    if torch.compiler.is_compiling():  # a compiled graph cannot read a context variable
        return None
    return next((trace for owner, trace in reversed(_active.get()) if owner is model), None)


@contextlib.contextmanager
def tracing(model: nn.Module, maps: Collection[str] = ()) -> Iterator[Trace]:
    """Record what forwards of `model` do inside the `with` block, `generate` included; only in this thread.

    Args:
        maps: full attention maps to keep from a model with connectivity masks: "mask", "scores", "attention". They are
            quadratic in the tokens.

    Raises:
        ConfigError: for an unknown map.
        VTokenError: if the model has no method applied, or if no forward of it ran (a compiled model records nothing).

    Example:
        >>> import timm, torch, vtoken
        >>> model = timm.create_model("test_vit").eval()
        >>> with vtoken.tracing(vtoken.apply(model, "tome", r=8)) as record:
        ...     logits = model(torch.randn(1, 3, 160, 160))
        >>> record.size.sum()  # patches and the class token
        tensor(101.)
    """
    traced = [m for m in model.modules() if _is_traced(m)]
    if not traced:
        raise VTokenError(
            f"nothing to trace: no method is applied to this {type(model).__name__}; "
            f"{unapplied(model) or 'vtoken.apply it first'}"
        )
    if isinstance(maps, str):
        maps = (maps,)
    for name in maps:
        checks.choice("tracing", "maps", name, MAPS)
    record = Trace(maps=frozenset(maps))
    token = _active.set((*_active.get(), *((m, record) for m in traced)))
    try:
        yield record
    finally:
        _active.reset(token)
    if record.num_forwards == 0:
        raise VTokenError("nothing was recorded: the model did not run, or ran compiled; trace the model itself")


def _is_traced(module: nn.Module) -> bool:
    """Whether a module carries a method or is one of our wrappers that say so."""
    return "_vtoken" in module.__dict__ or getattr(type(module), "_vtoken_records", False)


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Trace]:
    """`model(*args, **kwargs)` and the record of what happened to its tokens.

    Example:
        >>> import timm, torch, vtoken
        >>> model = timm.create_model("test_vit").eval()
        >>> logits, record = vtoken.trace(vtoken.apply(model, "tome", r=8), torch.randn(1, 3, 160, 160))
        >>> record.tokens[:2]
        [101, 93]
    """
    with tracing(model) as record:
        output = model(*args, **kwargs)
    return output, record
