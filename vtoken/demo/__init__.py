"""Real weights and real photographs for demonstrations and fidelity tests."""
