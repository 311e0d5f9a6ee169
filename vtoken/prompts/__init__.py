"""A prompt with fewer image or video tokens: its tensors, its calls, its generation."""
