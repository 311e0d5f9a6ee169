"""Attention over chosen connections: which keys every query keeps, and the ways to run it."""
