"""Reading attention, keys and unprojected rows of a vLLM tower while it runs, by hooks that are gone afterwards."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

from vtoken.core.visual import Needs
from vtoken.errors import UnsupportedModelError
from vtoken.ops import class_row, received_row


def refuse(needs: Needs, vllm_config: Any) -> None:
    """Raise UnsupportedModelError for engines whose towers cannot be read, if something is to be read."""
    if not needs.layers and not needs.features & {"keys", "before"}:
        return
    media, parallel = vllm_config.model_config.get_multimodal_config(), vllm_config.parallel_config
    told = {
        "compile_mm_encoder": bool(vllm_config.compilation_config.compile_mm_encoder),
        "mm_encoder_tp_mode='data'": media.mm_encoder_tp_mode == "data" and parallel.tensor_parallel_size > 1,
    }
    for setting, holds in told.items():
        if holds:
            raise UnsupportedModelError(
                f"{setting}: the attention of such a tower cannot be read; leave it out, or take a method that reads "
                "final rows alone, such as divprune"
            )


class Taps:
    """What one run of a tower says.

    Args:
        needs: what is to be read.
        attentions: of every block the module that multiplies queries, keys and values.
        projections: of every block the module that makes them; only where keys are rotated on the way, else None.
        projector: the module behind the tower.
    """

    def __init__(
        self,
        needs: Needs,
        attentions: Sequence[nn.Module],
        projections: Sequence[nn.Module] | None,
        projector: nn.Module,
    ) -> None:
        self._needs, self._attentions, self._projections, self._projector = needs, attentions, projections, projector
        last = needs.layers[-1] if needs.layers else len(attentions) - 1
        self._keys_of = last if "keys" in needs.features else None
        self._rows: dict[int, Tensor] = {}
        self._handles: list[Any] = []
        #: Keys of the last block that is read, [.., T, D], mean over heads.
        self.keys: Tensor | None = None
        #: What the projector is given.
        self.before: Tensor | None = None

    def __enter__(self) -> Taps:
        projected = self._projections is not None
        heard = {*self._needs.layers} | ({self._keys_of} if self._keys_of is not None and not projected else set())
        for layer in heard:
            hook = functools.partial(self._multiplied, layer)
            self._handles.append(self._attentions[layer].register_forward_pre_hook(hook, with_kwargs=True))
        if self._keys_of is not None and self._projections is not None:
            self._handles.append(self._projections[self._keys_of].register_forward_hook(self._made))
        if "before" in self._needs.features:
            self._handles.append(self._projector.register_forward_pre_hook(self._entered))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        for handle in self._handles:
            handle.remove()

    def attention(self) -> list[Tensor]:
        """Of every layer that is read the rows [B, T] float32; packed images are [1, T]."""
        missing = [layer for layer in self._needs.layers if layer not in self._rows]
        if missing:
            raise UnsupportedModelError(
                f"the attention of block {missing[0]} was not seen; take a method that reads none, such as divprune"
            )
        return [_over_ranks(self._rows[layer]) for layer in self._needs.layers]

    def _multiplied(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("query", "key", "value", "cu_seqlens")
        given = dict(zip(names, args, strict=False)) | kwargs
        q, k = (self._heads(given[name], module) for name in ("query", "key"))
        if layer == self._keys_of and self._projections is None:
            self.keys = _over_ranks(k.float().mean(1))
        if layer not in self._needs.layers:
            return
        scale, bounds = float(module.scale), given.get("cu_seqlens")
        lengths = [q.shape[2]] if bounds is None else bounds.diff().tolist()
        parts = [
            class_row(q_[:, :, 0], k_, scale=scale)
            if self._needs.attention == "class"
            else received_row(q_, k_, scale=scale)
            for q_, k_ in zip(q.split(lengths, dim=2), k.split(lengths, dim=2), strict=True)
            if q_.shape[2]
        ]
        self._rows[layer] = torch.cat(parts, dim=1)

    def _made(self, module: Any, args: tuple[Any, ...], out: Any) -> None:
        if get_tensor_model_parallel_world_size() > 1:
            raise UnsupportedModelError("keys of this tower cannot be read under tensor parallelism")
        made = out[0] if isinstance(out, tuple) else out  # [T, 1, 3 * H * D]
        first: Any = self._attentions[0]
        head = int(first.head_size)
        self.keys = made.flatten(0, -2).unflatten(1, (3, -1, head))[:, 1].float().mean(1)

    def _entered(self, module: Any, args: tuple[Any, ...]) -> None:
        self.before = args[0]

    @staticmethod
    def _heads(x: Tensor, module: Any) -> Tensor:
        """[B, T, H, D], or [B, T, H * D], as [B, H, T, D]."""
        x = x.detach()
        return (x if x.dim() == 4 else x.unflatten(-1, (-1, int(module.head_size)))).transpose(1, 2)


def _over_ranks(x: Tensor) -> Tensor:
    """The mean over the ranks of tensor parallelism, each of which has as many heads."""
    ranks = get_tensor_model_parallel_world_size()
    return x if ranks == 1 else tensor_model_parallel_all_reduce(x) / ranks
