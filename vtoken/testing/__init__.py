"""The promises of docs/mechanism.md 1, tried on what somebody wrote outside this package."""

from vtoken.testing.host import check_host
from vtoken.testing.method import check_method
from vtoken.testing.prompts import check_family, check_prompt_method

__all__ = ["check_family", "check_host", "check_method", "check_prompt_method"]
