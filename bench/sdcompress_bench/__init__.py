"""Measures pipelines: how fast each backend is, how far from PyTorch, and how far a student is from its teacher."""
