"""What the site's reader of docstrings (griffe) is told about ours: "Example:" heads code as "Examples:" does."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Lets examples be read as code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for every object once it is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
