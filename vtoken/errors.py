"""The exception family. Every message says what was found, what is supported and what to do."""

from __future__ import annotations


class VTokenError(Exception):
    """Base class of all errors that vtoken raises on purpose."""


class UnsupportedModelError(VTokenError, TypeError):
    """The model (or one of its blocks) is not one that tokens can be taken from; nothing was changed."""


class ConfigError(VTokenError, ValueError):
    """Settings are out of range, contradict each other or do not fit the model."""


class AlreadyAppliedError(VTokenError, RuntimeError):
    """The model already carries a method; call `vtoken.remove` first or pass `replace=True`."""


class InputError(VTokenError, ValueError):
    """An argument of a forward pass or of an op cannot be served."""


class ShapeError(InputError):
    """A tensor has the wrong number of dimensions or a size that contradicts another tensor."""


class VTokenWarning(UserWarning):
    """A call runs, but not as its caller may believe; the message says what runs and what to call instead."""
