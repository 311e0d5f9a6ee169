"""CDPruner: keep image tokens that differ and that the instruction is about (arXiv 2506.10967)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken import checks
from vtoken.core.config import register_method
from vtoken.core.method import PromptMethod
from vtoken.core.visual import Needs, Seen, TowerFacts
from vtoken.errors import ConfigError
from vtoken.methods.divprune import SPACES
from vtoken.methods.sharing import ShareConfig, Sharing
from vtoken.ops.rows import full_precision

_FLOOR, _RANK = 1e-3, 1e-5


@register_method
@dataclass(frozen=True, kw_only=True)
class CDPruner(ShareConfig):
    """Image tokens by a determinantal point process that relevance to the instruction conditions; nothing is trained.

    K = diag(r) L diag(r), with L the cosines of the tokens and r their relevance, brought to [0, 1] in every cell. The
    choice is the greedy one for the largest determinant of K. Relevance is the mean cosine of a token, behind the
    projector, to the input embeddings of the instruction: the text behind the last image of its prompt row, words of
    the chat template among them. Or it comes with the call, say from a CLIP text tower:
    `vtoken.budget(model, relevance=r)`, [n] a visual; `query=ids` names other words. The paper's body could not be
    read: the source of the text and the sign are this library's own choice.

    Args:
        num_tokens, keep_ratio, newline, positions: as in `vtoken.VTCCLS`.
        space: rows that are compared with each other, "after" or "before" the projector.
        relevance_sign: 1, or -1 where patches are known to be less like a text about them than background is.

    Raises:
        ConfigError: for values out of range. InputError (in a call): if there is no instruction.

    Example:
        >>> import vtoken
        >>> vtoken.CDPruner(keep_ratio=0.1).relevance_sign
        1

    Source: arXiv 2506.10967; docs/methods/prompt_methods.md 4.
    """

    method: ClassVar[str] = "cdpruner"

    space: str = "after"
    relevance_sign: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("CDPruner", "space", self.space, SPACES)
        sign = checks.whole("CDPruner", "relevance_sign", self.relevance_sign)
        if sign not in (1, -1):
            raise ConfigError(f"CDPruner(relevance_sign={sign}): must be 1 or -1")
        object.__setattr__(self, "relevance_sign", sign)

    def build(self, depth: int) -> PromptMethod:
        """The choice."""
        return ConditionalDPP(self)


class ConditionalDPP(Sharing):
    """A greedy choice in every cell."""

    clues = frozenset({"relevance", "query"})
    config: CDPruner

    def needs(self, tower: TowerFacts) -> Needs:
        """Features and the text."""
        return Needs(features=frozenset({self.config.space, "after"}), text=True)

    def choose(self, seen: Seen) -> Tensor:
        """Cell by cell."""
        x: Tensor = getattr(seen, self.config.space)
        r = self.scores(seen).to(x.device)

        def pick(part: Tensor, k: int) -> Tensor:
            at = part.to(x.device)
            return greedy_map(*conditional_kernel(x[at], r[at]), k)

        return self.each(seen, pick)

    def scores(self, seen: Seen) -> Tensor:
        """Relevance as given or computed, with its sign."""
        given = seen.clues.get("relevance")
        if given is not None:
            return self.config.relevance_sign * torch.as_tensor(given).float()
        assert seen.after is not None
        assert seen.text is not None
        return self.config.relevance_sign * text_relevance(seen.after, seen.text.to(seen.after.device))


def text_relevance(x: Tensor, text: Tensor) -> Tensor:
    """Mean cosine [n] of rows [n, C] to the rows of a text [m, C]."""
    with torch.no_grad(), full_precision(x):
        return (_unit(x) @ _unit(text).T).mean(1)


def conditional_kernel(x: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """K [n, n] and r [n] of rows [n, C] and relevances [n] on any scale; all equal: a plain process."""
    with torch.no_grad(), full_precision(x):
        unit = _unit(x).nan_to_num()
        r = relevance.detach().to(unit)
        r = r.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("inf"))
        r = r.masked_fill(r.isinf(), float(r[~r.isinf()].amin()) if bool((~r.isinf()).any()) else 0.0)
        spread = r.amax() - r.amin()
        r = (r - r.amin()) / spread if bool(spread > 1e-12) else torch.ones_like(r)
        r = r.clamp_min(_FLOOR)
        return r.unsqueeze(1) * (unit @ unit.T) * r, r


def greedy_map(kernel: Tensor, spare: Tensor, k: int) -> Tensor:
    """Greedy choice [k], ascending, for the largest determinant of a kernel [n, n]; beyond its rank by `spare` [n]."""
    own = kernel.diagonal()
    gain, rows, free = own.clone(), kernel.new_zeros(k, len(kernel)), torch.zeros_like(own)
    picked = torch.empty(k, dtype=torch.int64, device=kernel.device)
    for i in range(k):
        live = torch.where(gain > _RANK * own, gain, -torch.inf)
        j = torch.where(live.amax() > 0, live, spare + free).argmax()
        picked[i] = j
        e = (kernel[j] - rows[:i, j] @ rows[:i]) / torch.maximum(gain[j], (_RANK * own[j]).clamp_min(1e-30)).sqrt()
        rows[i] = e
        free = free.index_fill(0, j.view(1), -torch.inf)
        gain = gain - e.square() + free
    return picked.sort().values


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.detach().to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-12)
