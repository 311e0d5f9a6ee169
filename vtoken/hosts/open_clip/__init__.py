"""The image towers of open_clip."""
