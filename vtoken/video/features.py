"""One video behind the tower: enough to answer any number of questions about it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vtoken.core.visual import Encoded, Visual


@dataclass(frozen=True, eq=False)
class VideoFeatures:
    """What `vtoken.QuotaVideoModel.encode_video` gives.

    Args:
        visual: how the video lies in a prompt.
        encoded: what the model made of it.
        inputs: what the model needs to number positions, such as its grid; one row each.
    """

    visual: Visual
    encoded: Encoded
    inputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def grid(self) -> Tensor:
        """Features [T, H, W, C] where they are resampled; deeper levels are beside them."""
        if self.encoded.native is not None:
            return torch.stack(self.encoded.native[0])
        rows = torch.cat([level[0] for level in self.encoded.levels], dim=-1)
        return rows[self.visual.places().to(rows.device)].unflatten(0, (-1, *self.visual.cells[0].grid))

    def to(self, device: torch.device | str) -> VideoFeatures:
        """The same on another device."""
        native = self.encoded.native
        encoded = replace(
            self.encoded,
            levels=[[rows.to(device) for rows in level] for level in self.encoded.levels],
            native=None if native is None else [tuple(cell.to(device) for cell in native[0])],
        )
        return replace(self, encoded=encoded, inputs={name: value.to(device) for name, value in self.inputs.items()})
