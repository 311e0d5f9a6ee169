"""A budget of tokens spread over the frames of a video, and a frame's features as that many tokens."""
