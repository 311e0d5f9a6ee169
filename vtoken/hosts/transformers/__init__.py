"""transformers' image towers, and the tower inside a LLaVA."""
