"""`vtoken.tune`: settings for a target cost, chosen by how much a model's own output changes."""
