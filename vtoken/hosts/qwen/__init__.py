"""transformers' Qwen-VL models: rows of patches with a grid, positions along three axes."""
