"""Measures pipelines: how fast each backend is, how far it is from PyTorch, and how far a student is from its teacher."""
