"""The blocks of an unpatched tower, with the attention of some of them read on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from vtoken.core.bound import BoundBlocks
from vtoken.core.calling import call_with
from vtoken.core.watch import Row, Watch


def watched(container: Any, watch: Watch, parts: Callable[[Any, Row], dict[str, Any]]) -> BoundBlocks:
    """Stands where the blocks of a tower stood, for one call of the tower.

    Args:
        container: the blocks.
        watch: chooses which are read, and is told.
        parts: of a block and what makes its row of scores: what stands in the block while it runs.
    """
    layers, blocks = set(watch.layers), list(container)
    if watch.stop:
        blocks = blocks[: watch.layers[-1] + 1]
    calls = [functools.partial(_run, b, i, watch, parts) if i in layers else b for i, b in enumerate(blocks)]
    return BoundBlocks(container, blocks, calls, watched=True)


def _run(
    block: nn.Module, layer: int, watch: Watch, parts: Callable[[Any, Row], dict[str, Any]], *args: Any, **kwargs: Any
) -> Any:
    row = watch.row(layer)
    return block(*args, **kwargs) if row is None else call_with(block, parts(block, row), *args, **kwargs)
