"""What a model costs, in tokens and FLOPs, before and after; and how long it takes."""
