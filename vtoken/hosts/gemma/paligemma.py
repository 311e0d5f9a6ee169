"""Images of PaliGemma, in front of the prompt, whose prefix sees itself in both directions."""

from __future__ import annotations

from vtoken.hosts.gemma.route import Gemma


class PaliGemma(Gemma):
    """A token is a patch; `token_type_ids` tell the prefix from the suffix and are shortened with the ids."""

    name = "transformers PaliGemma"
    models = frozenset({("paligemma", "PaliGemmaForConditionalGeneration")})
