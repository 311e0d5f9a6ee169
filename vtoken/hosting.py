"""What an adapter for models of your own is made of; `docs/extend/host.md` writes one.

`HostAdapter` says what the model is, `forward_of` opens one forward in the model's entry method, `bound` gives its
blocks the state of that forward, `merged_block` is a block that loses tokens, `block_targets` lists what is patched.
`TappedMixin` shows the keys of an attention, `forward_with` runs a module's own forward with parts exchanged.
`SavesSettings` is a base for the mixin of a transformers model: `save_pretrained` then writes what is applied.
"""

from vtoken.core.blocks import merged_block
from vtoken.core.bound import bound
from vtoken.core.carried import SavesSettings
from vtoken.core.forward import forward_of
from vtoken.core.host import HostAdapter, register_adapter
from vtoken.core.patch import forward_with
from vtoken.core.spec import HostSpec
from vtoken.core.tap import TappedMixin
from vtoken.hosts.tower import block_targets

__all__ = [
    "HostAdapter",
    "HostSpec",
    "SavesSettings",
    "TappedMixin",
    "block_targets",
    "bound",
    "forward_of",
    "forward_with",
    "merged_block",
    "register_adapter",
]
