"""Tokens that become fewer: which go together, how their rows are combined, attention that knows their sizes."""
