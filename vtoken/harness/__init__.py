"""Models with fewer tokens for evaluation harnesses, which find them by entry points."""
