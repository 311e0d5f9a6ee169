"""One video behind the tower: enough to answer any number of questions about it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vtoken.core.visual import Encoded, Visual


@dataclass(frozen=True, eq=False)
class VideoFeatures:
    """What `vtoken.QuotaVideoModel.encode_video` gives.

    Args:
        visual: how the video lies in a prompt.
        encoded: what the model made of it.
        native: its cells on their native grids, [H, W, C] each.
        inputs: what the model needs to number positions, such as its grid; one row each.
    """

    visual: Visual
    encoded: Encoded
    native: tuple[Tensor, ...]
    inputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def grid(self) -> Tensor:
        """Features [T, H, W, C] where they are resampled; deeper levels are beside them."""
        return torch.stack(self.native)

    def to(self, device: torch.device | str) -> VideoFeatures:
        """The same on another device."""

        def moved(values: Any) -> Any:
            return values if values is None else type(values)(v.to(device) for v in values)

        levels = [moved(level) for level in self.encoded.levels]
        native = moved(self.native)
        return replace(
            self,
            encoded=replace(self.encoded, levels=levels, native=[native]),
            native=native,
            inputs={name: value.to(device) for name, value in self.inputs.items()},
        )
