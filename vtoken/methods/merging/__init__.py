"""PiToMe, its baselines, and what they share."""
