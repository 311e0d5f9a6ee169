"""The promises of docs/mechanism.md 1, tried on what somebody wrote outside this package."""

from vtoken.testing.host import check_host
from vtoken.testing.method import check_method

__all__ = ["check_host", "check_method"]
