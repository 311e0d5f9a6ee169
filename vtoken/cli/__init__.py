"""The commands behind `python -m vtoken`."""
