"""transformers' LLaVA family: prompts that get fewer image tokens."""
