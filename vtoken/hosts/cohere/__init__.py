"""transformers' Aya Vision and Cohere2 Vision: tiles whose patches are joined before the projector."""
