"""transformers' VideoLLaMA3: images and videos."""
