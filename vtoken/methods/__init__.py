"""One file per method: its settings and its few lines of logic."""
