"""Weights published under other parameter names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vtoken.core.patch import PREDICTOR
from vtoken.errors import ConfigError

#: A predictor's own parameters (docs/methods/sparsifiner.md 2).
PARTS = ("reduce_q.weight", "reduce_q.bias", "reduce_k.weight", "reduce_k.bias", "w_down", "w_up")


def load_published_state_dict(model: nn.Module, state: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Load a checkpoint whose predictors have other parameter names into a model with Sparsifiner.

    Backbone keys must be the model's own (the authors build on timm's). vtoken was written without the published code,
    so the predictor's names come from you: print the keys of block 0 that the plain backbone lacks, and tell the six
    apart by shape. With N tokens, K basis vectors, head width d and reduced width c (docs/methods/sparsifiner.md 2),
    the two
    [c, d] matrices and the two [c] vectors are the reductions of queries and keys; of the two [N, K] (or, as layers
    without bias store them, [K, N]) matrices the one applied to keys is `w_down`, the one that gives scores `w_up`.

    Args:
        model: patched with Sparsifiner, or a `vtoken.nn.SparseAttention`, or any module that holds one.
        state: the checkpoint's parameters, e.g. {"blocks.0.attn.<their name>": ...}: what lies under "model" in a file
            of a whole training run, without the "module." that a distributed run puts before every key.
        names: for each of `reduce_q.weight`, `reduce_q.bias`, `reduce_k.weight`, `reduce_k.bias`, `w_down`, `w_up`: the
            end of its name in the checkpoint, after "blocks.N.attn.". Matrices stored transposed are turned. With
            `share_proj` the two are one matrix: one name is enough, and a checkpoint that holds it under both names
            must hold the same numbers.

    Raises:
        ConfigError: for missing or unknown names, left-over keys, shapes that do not fit, two values for one parameter;
            nothing is loaded.

    Example:
        If the keys of the first block are "blocks.0.attn.predictor.q_proj.weight" and so on:

        >>> names = {
        ...     "reduce_q.weight": "predictor.q_proj.weight", "reduce_q.bias": "predictor.q_proj.bias",
        ...     "reduce_k.weight": "predictor.k_proj.weight", "reduce_k.bias": "predictor.k_proj.bias",
        ...     "w_down": "predictor.down.weight", "w_up": "predictor.up.weight",
        ... }
        >>> vtoken.apply(model, vtoken.Sparsifiner(keep_ratio=0.25))  # doctest: +SKIP
        >>> state = torch.load("checkpoint.pth", weights_only=True)["model"]  # doctest: +SKIP
        >>> load_published_state_dict(model, state, names)  # doctest: +SKIP
    """
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        raise ConfigError(f"names has {unknown}; a predictor has {', '.join(PARTS)}")
    ours = dict(model.state_dict())
    theirs = {f".{their}": f".{PREDICTOR}.{part}" for part, their in names.items()}
    # One parameter may have two names (share_proj).
    same = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    found: dict[str, Tensor] = {}
    given: dict[int | str, tuple[str, Tensor]] = {}
    unplaced: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"the checkpoint's {key!r} is no tensor but a {type(value).__name__}; give its parameters"
            )
        # The keys of a bare attention have nothing before them; of two ends that fit the longer one is meant.
        end = max((end for end in theirs if f".{key}".endswith(end)), key=len, default="")
        target = (f".{key}".removesuffix(end) + theirs[end]).removeprefix(".") if end else key
        if target not in ours:
            unplaced[key] = value
            continue
        found[target] = _fitted(key, value, target, ours[target])
        first, before = given.setdefault(same.get(target, target), (key, found[target]))
        if not torch.equal(before, found[target]):
            raise ConfigError(
                f"the checkpoint's {first!r} and {key!r} differ, but are one parameter of the model, {target!r}; apply "
                "Sparsifiner with share_proj=False if the checkpoint has two matrices"
            )
    for key, value in unplaced.items():
        if not _repeats(key, value, found, same):
            raise ConfigError(f"the checkpoint's {key!r} {tuple(value.shape)} has no place in the model; see `names`")
    # Thresholds are calibrated, not published.
    rest = [name for name in ours if name not in found and not f".{name}".endswith(f".{PREDICTOR}.threshold")]
    missing = sorted(name for name in rest if same.get(name) not in given)
    if missing:
        raise ConfigError(f"the checkpoint lacks {len(missing)} of the model's parameters, the first: {missing[0]!r}")
    model.load_state_dict(found, strict=False)


def _fitted(key: str, value: Tensor, target: str, like: Tensor) -> Tensor:
    """The value as the model has it, turned if need be."""
    turned = value.shape != like.shape and value.ndim == 2 and value.T.shape == like.shape
    value = value.T if turned else value
    if value.shape != like.shape:
        raise ConfigError(
            f"{key!r} has shape {tuple(value.shape)}, the model's {target!r} {tuple(like.shape)}; check num_basis, "
            "reduce_c_factor and the image size"
        )
    return value


def _repeats(key: str, value: Tensor, found: Mapping[str, Tensor], same: Mapping[str, int]) -> bool:
    """Whether a key without a place is a shared matrix of its attention once more, under a name that was not given."""
    for name, matrix in found.items():
        attention = name.rpartition(f"{PREDICTOR}.")[0]
        shared = name in same and list(same.values()).count(same[name]) > 1
        if shared and key.startswith(attention) and (torch.equal(value, matrix) or torch.equal(value.T, matrix)):
            return True
    return False
