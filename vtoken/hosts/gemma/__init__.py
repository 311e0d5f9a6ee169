"""transformers' Gemma 3 and PaliGemma: SigLIP towers in front of prompts in which image tokens see each other."""
