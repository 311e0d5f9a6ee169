"""transformers' InternVL models: tiles whose patches are joined two by two before the projector."""
