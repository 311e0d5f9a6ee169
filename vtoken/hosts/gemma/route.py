"""How shortened prompts enter Gemma 3 and PaliGemma, whose masks are made from ids and `token_type_ids`."""

from __future__ import annotations

from typing import Any

from vtoken.hosts.qwen.old import encoded
from vtoken.hosts.tiles import Tiles
from vtoken.prompts.calls import refuse_chunks
from vtoken.prompts.family import takes_outputs


class Gemma(Tiles):
    """`generate` takes no embeddings: where it takes no ready outputs either, a tower hands them out."""

    def hand_over(self, model: Any, call: dict[str, Any], *, generating: bool) -> tuple[Any, dict[str, Any]]:
        """Ids and ready outputs, in every release."""
        if not generating or takes_outputs(model) or call.get("inputs_embeds") is not None:
            return super().hand_over(model, call, generating=generating)
        refuse_chunks(model, call, "needs a transformers whose generate takes mm_encoder_outputs (5.18 does)")
        return encoded(model, call | {"mm_encoder_outputs": call.pop("features")}, self.token_ids(model))
