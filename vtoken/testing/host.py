"""`vtoken.testing.check_host`: the promises, tried on an adapter that somebody wrote for a model of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from vtoken.core.config import MethodConfig, example
from vtoken.core.host import Host, HostAdapter, forget_adapter, host_of, register_adapter, registered
from vtoken.errors import ConfigError
from vtoken.testing import promises
from vtoken.testing.promises import broken
from vtoken.testing.twins import pooling

#: Methods that ask different things of a host: keys, several variants of merging, dropping, merging behind the MLP.
_ASKING = ("pitome", "tome", "random_prune", "random_merge")


def check_host(
    adapter: type[HostAdapter] | HostAdapter, model: nn.Module, *, configs: Sequence[MethodConfig] = ()
) -> tuple[str, ...]:
    """Try on a model of your own that its adapter keeps what vtoken promises (docs/mechanism.md 1).

    Tried are: the measures fit the model; no-op equality; planned counts are those of a trace; groups and sizes; sizes
    enter attention and pooling; undoing; state-dict keys and modes; counted cost; hooks of all modules get the model's
    own modules; gradients, two forwards before one backward, recomputed blocks; nothing left behind by a forward;
    independence of the batch; threads; copies; dtypes and devices. It takes some seconds on a small model.

    Args:
        adapter: the class that `vtoken.register_adapter` takes, or one of it. Registered for the length of the call.
        model: a small model in eval mode, not patched.
        configs: settings under which tokens are removed; by default those of several merging and pruning methods, with
            "between" and "after", keys and hidden states.

    Returns:
        The settings that were tried, as text.

    Raises:
        AssertionError: if a promise is not kept; the text begins with the promise.
        ConfigError: if the model is in train mode, or the adapter is not one that can be registered.
        UnsupportedModelError, VTokenError: whatever the adapter says of the model.

    Example:
        >>> import timm, vtoken
        >>> from vtoken.hosts.timm.adapter import TimmAdapter
        >>> model = timm.create_model("test_vit").eval()
        >>> len(vtoken.testing.check_host(TimmAdapter, model, configs=[vtoken.ToMe(r=4)]))
        1
    """
    kind = adapter if isinstance(adapter, type) else type(adapter)
    if model.training:
        raise ConfigError("check_host compares outputs, so the model must be in eval mode: call model.eval() first")
    with _registered(kind):
        host = host_of(model)
        if type(host.adapter) is not kind:
            raise ConfigError(f"{kind.__name__}.matches says of this {type(model).__name__} that it is not its own")
        measures(host)
        given = [*configs] or _settings()
        promises.hooks(model, given[0])
        for config in given:
            promises.no_op(model, config.replace(layers=()))
            promises.counts(model, config)
            promises.groups(model, config, pruned=getattr(config, "reduction", None) == "prune")
            promises.undone(model, config)
        weighed = next((c for c in given if getattr(c, "prop_attn", False)), None)
        if weighed is not None:
            promises.sizes(model, weighed)
        pooling(model)
        for promise in (*promises.EVERY, promises.memory):
            promise(model, given[0])
    return tuple(map(str, given))


def measures(host: Host) -> None:
    """What the adapter says of the model is true of it."""
    spec, adapter, model = host.spec, host.adapter, host.model
    blocks = adapter.blocks(model)
    if len(blocks) != spec.depth:
        broken("the measures fit the model", f"spec says {spec.depth} blocks, blocks() gives {len(blocks)}")
    for name, block in blocks:
        if model.get_submodule(name) is not block:
            broken("the measures fit the model", f"blocks() names {name}, which is another module of the model")
    if tuple(spec.grid) != tuple(host.grid(host.image_size())):
        broken(
            "the measures fit the model", f"spec.grid is {spec.grid}, grid(image_size) {host.grid(host.image_size())}"
        )


def _settings() -> list[MethodConfig]:
    found = [example(name) for name in _ASKING]
    return [*found, found[0].replace(place="after", metric="hidden"), found[1].replace(metric="key_concat")]


@contextlib.contextmanager
def _registered(adapter: type[HostAdapter]) -> Iterator[None]:
    known = any(type(one) is adapter for one in registered())
    register_adapter(adapter)
    try:
        yield
    finally:
        if not known:
            forget_adapter(adapter)
