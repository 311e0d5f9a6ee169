"""The common body: settings, plans, the state of one forward pass, and how a live model is entered and left."""
