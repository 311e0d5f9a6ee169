"""Sparsifiner: settings, predictors, attention, and the parts of its training."""
