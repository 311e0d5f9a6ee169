"""The same methods as plain modules, for people who build their own network or training loop."""

from vtoken.methods.sparsifiner.predictor import ConnectivityPredictor
from vtoken.nn.merging import MergeBlock, MergeTokens
from vtoken.nn.sparse import SparseAttention

__all__ = ["ConnectivityPredictor", "MergeBlock", "MergeTokens", "SparseAttention"]
