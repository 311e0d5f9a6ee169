"""The same merging as plain modules, for people who build their own network or training loop."""

from vtoken.nn.merging import MergeBlock, MergeTokens

__all__ = ["MergeBlock", "MergeTokens"]
