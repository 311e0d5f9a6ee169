"""transformers' Idefics3 and SmolVLM models: tiles with text between them, patches shuffled into channels."""
