"""One file per family of models: how to recognise it, enter it, and hand it its tokens back."""
