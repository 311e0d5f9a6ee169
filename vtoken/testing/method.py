"""`vtoken.testing.check_method`: the promises, tried on a method that somebody wrote."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import FrozenInstanceError, fields

import torch
from torch import Tensor, nn

from vtoken.core.config import MethodConfig, config_from_dict, methods
from vtoken.core.host import find_adapter
from vtoken.core.method import BlockMethod
from vtoken.core.slots import Slot
from vtoken.errors import ConfigError
from vtoken.methods.merging.base import MergeConfig, Merging, ScheduledMergeConfig
from vtoken.testing import promises
from vtoken.testing.models import small_models
from vtoken.testing.promises import broken


def check_method(
    config: MethodConfig, noops: Sequence[MethodConfig] = (), *, models: Mapping[str, nn.Module] | None = None
) -> tuple[str, ...]:
    """Try on small models that a method of your own keeps what vtoken promises (docs/mechanism.md 1).

    Tried are: settings can be compared, copied, pickled and written as JSON; one step keeps prefix rows, counts, dtype
    and its input, names every row once and leaves protected patches alone; no-op equality; planned counts; groups and
    sizes; undoing; state-dict keys and modes; counted cost; gradients, two forwards before one backward, recomputed
    blocks; nothing left behind by a forward; independence of the batch; threads; copies; dtypes and devices. It takes a
    few seconds.

    Args:
        config: settings under which the method removes tokens.
        noops: settings under which it removes none. Where it derives from MergeConfig `layers=()` is tried in any case,
            from ScheduledMergeConfig also `r=0` and `ratio=1.0`; another method must be given some.
        models: supported towers to try it on, by name, in eval mode; None means small ones with random weights, of
            timm, and of open_clip and transformers where they are installed.

    Returns:
        The names of the models.

    Raises:
        AssertionError: if a promise is not kept; the text begins with the promise, and ends with the model.
        ConfigError: if there is nothing to try: no tokens are removed, no settings that remove none are known, or the
            method does not act in the blocks.
        VTokenError: whatever vtoken itself says of the method.

    Example:
        >>> import vtoken
        >>> "open_clip VisionTransformer" in vtoken.testing.check_method(vtoken.ToMe(r=4))
        True
    """
    _block_method(config)
    settings(config)
    without = [*_without(config), *noops]
    if not without:
        raise ConfigError(
            f"check_method needs settings under which {type(config).__name__} removes nothing: "
            "check_method(config, noops=[...])"
        )
    pruned = getattr(config, "reduction", None) == "prune"
    tried = small_models() if models is None else dict(models)
    for name, model in tried.items():
        spec = find_adapter(model).spec(model)
        try:
            step(config, spec.depth)
            for noop in without:
                promises.no_op(model, noop)
            promises.counts(model, config)
            promises.groups(model, config, pruned=pruned)
            for promise in (promises.undone, *promises.EVERY):
                promise(model, config)
            if name == next(iter(tried)):  # slow, and the same on all
                promises.memory(model, config)
        except AssertionError as error:
            raise AssertionError(f"{error} (on {name})") from error
    return tuple(tried)


def settings(config: MethodConfig) -> None:
    """Settings are data: frozen, compared by value, hashable, copied, pickled, and read back from JSON."""
    name = type(config).__name__
    same = config.replace()
    if same != config or hash(same) != hash(config):
        broken("settings are compared by value", f"{name} is no frozen dataclass: write @dataclass(frozen=True)")
    for field in fields(config)[:1]:
        try:
            setattr(config, field.name, getattr(config, field.name))
        except FrozenInstanceError:
            continue
        broken("settings are frozen", f"{name}.{field.name} can be set: write @dataclass(frozen=True)")
    try:
        copied = pickle.loads(pickle.dumps(config))
    except Exception as error:
        raise AssertionError(
            f"settings can be pickled: {type(error).__name__}: {error}. Let {name} stand at the top of a module"
        ) from error
    if copied != config or copy.deepcopy(config) != config:
        broken("settings can be pickled and copied", f"a copy of {config} is another")
    if config.method in methods():
        read = config_from_dict(json.loads(json.dumps(config.to_dict())))
        if read != config:
            broken(
                "settings can be written as JSON",
                f"{config} came back as {read}. JSON knows no tuples: let __post_init__ turn lists into them",
            )


def step(config: MethodConfig, depth: int) -> None:
    """One step by itself: prefix rows, counts, what is known of the tokens, dtype, and the input left alone."""
    method = _block_method(config, depth)
    removes = 0
    for num_prefix in (0, 1, 5):
        for layer in range(depth):
            for mergeable in (64, 37, 2, 1, 0):
                if any(patch >= mergeable for patch in getattr(config, "protect", ())):
                    continue  # images that lack a patch that is to be protected are refused
                r = method.num_removed(layer, mergeable, mergeable)
                removes += r
                if type(r) is not int or not 0 <= r <= mergeable:
                    broken(
                        "counts are whole numbers of tokens that there are",
                        f"{type(method).__name__}.num_removed({layer}, {mergeable}) is {r!r}",
                    )
                if r > 0:
                    for dtype in (torch.float32, torch.bfloat16):
                        _one_step(method, layer, num_prefix, mergeable, r, dtype)
    if not removes:
        raise ConfigError(f"{config} removes nothing from 64 tokens: check_method takes settings that do")


def _one_step(
    method: BlockMethod, layer: int, num_prefix: int, mergeable: int, r: int, dtype: torch.dtype
) -> None:  # fmt: skip
    rng = torch.Generator().manual_seed(layer)
    tokens = num_prefix + mergeable
    x = torch.randn(2, tokens, 8, generator=rng).to(dtype)
    channels = 1 if method.metric == "cls" else 4
    metric = x if method.metric == "hidden" else torch.rand(2, tokens, channels, generator=rng)
    given = x.clone(), metric.clone()
    slot = Slot(embedded=tokens, track_anchor=True, track_dest=True)
    where = f"block {layer}, {num_prefix} prefix and {mergeable} other tokens"
    if isinstance(method, Merging):
        _whole_plan(method, layer, metric.float(), r, num_prefix, where)
    y, after = method.on_block(layer, x, metric, slot, num_prefix)
    if not (torch.equal(x, given[0]) and torch.equal(metric, given[1])):
        broken("inputs are never written to", f"{where}: the tokens or the metric are not what they were")
    gone = tokens - y.shape[1]
    if y.shape[0] != 2 or y.shape[2] != 8 or (gone != r if method.exact else not 0 <= gone <= r):
        said = f"{r}" if method.exact else f"at most {r}"
        broken("planned counts are kept", f"{where}: num_removed says {said}, {gone} were removed")
    if y.dtype != dtype:
        broken("dtype and device are kept", f"{where}: {dtype} became {y.dtype}")
    if not torch.equal(y[:, :num_prefix], x[:, :num_prefix]):
        broken("prefix tokens keep their rows and take nothing in", f"{where}: the first rows are not what they were")
    known = {"size": after.size, "anchor": after.anchor}
    for name, value in known.items():
        if value is not None and tuple(value.shape) != (2, y.shape[1]):
            broken("what is known of the tokens fits them", f"{where}: {name} is {tuple(value.shape)}")
    if gone and (after.anchor is None or after.dest is None):
        broken("what is known of the tokens fits them", f"{where}: anchors or group map were not advanced")


def _whole_plan(method: Merging, layer: int, metric: Tensor, r: int, num_prefix: int, where: str) -> None:
    """A plan names every row once, its partners are destinations, and protected patches have groups of their own."""
    guarded = torch.tensor(method.config.protect, dtype=torch.int64).expand(2, -1) if method.config.protect else None
    settings = method.layer_settings(layer)
    plan = method.config.match(layer, method.depth, metric.clone(), r, num_prefix, guarded, **settings)
    if plan.num_tokens_in != metric.shape[1]:
        return  # the step itself says so
    for named in torch.cat([plan.keep, plan.src], dim=1).tolist():
        if sorted(named) != list(range(len(named))):
            twice = sorted({row for row in named if named.count(row) > 1})
            never = sorted(set(range(len(named))) - set(named))
            broken("a plan names every row once", f"{where}: twice {twice}, never {never}")
    first = plan.num_tokens - plan.num_dest
    if plan.removed and not (first <= int(plan.slot.min()) and int(plan.slot.max()) < plan.num_tokens):
        broken(
            "sources join destinations",
            f"{where}: `partner` must count among the {plan.num_dest} destinations, from 0 on",
        )
    if guarded is not None:
        for dest, patches in zip(plan.dest.tolist(), (guarded + num_prefix).tolist(), strict=True):
            merged = [row - num_prefix for row in patches if dest.count(dest[row]) > 1]
            if merged:
                broken("protected patches never merge", f"{where}: {merged} of `protect` (no prefix counted) did")


def _block_method(config: MethodConfig, depth: int = 3) -> BlockMethod:
    if not isinstance(config, MethodConfig):
        raise ConfigError(f"check_method takes settings such as vtoken.ToMe(r=4), got {config!r}")
    built = config.build(depth)
    found = built if isinstance(built, BlockMethod) else None
    if found is None:
        raise ConfigError(f"check_method checks methods that remove tokens in the blocks; {config} does something else")
    return found


def _without(config: MethodConfig) -> list[MethodConfig]:
    """Settings under which it must remove nothing."""
    found: list[MethodConfig] = []
    if isinstance(config, MergeConfig):
        found.append(config.replace(layers=()))
    if isinstance(config, ScheduledMergeConfig):
        found += [config.replace(r=0), config.replace(ratio=1.0)]
    return found
