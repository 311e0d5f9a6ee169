"""Images of Gemma 3: every crop is an image of its own, with text between those of one picture.

Image tokens of a run see each other in both directions, which the model tells by `token_type_ids`; they are shortened
with the ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vtoken.hosts.exchanged import Exchanged, Overheard
from vtoken.hosts.gemma.route import Gemma


class Gemma3(Gemma):
    """A token is the mean over a block of patches."""

    name = "transformers Gemma 3"
    models = frozenset({("gemma3", "Gemma3ForConditionalGeneration")})

    def side_of(self, model: Any) -> int:
        """That of the pool."""
        return int(model.model.multi_modal_projector.kernel_size)

    def reading(self, model: Any, take: Callable[[Tensor], None]) -> dict[str, Any]:
        """Behind the pool."""
        projector = model.model.multi_modal_projector
        norm = Overheard(projector.mm_soft_emb_norm, before=take)
        return {"multi_modal_projector": Exchanged(projector, {"mm_soft_emb_norm": norm})}

    def project(self, model: Any, rows: Tensor) -> Tensor:
        """Behind the pool, as the projector does."""
        projector = model.model.multi_modal_projector
        projected: Tensor = projector.mm_soft_emb_norm(rows) @ projector.mm_input_projection_weight
        return projected.type_as(rows)

    def projector_macs(self, model: Any) -> int:
        """Of its one product."""
        return int(model.model.multi_modal_projector.mm_input_projection_weight.numel())
