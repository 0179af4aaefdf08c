"""Training data drawn by the teacher itself, on any backend."""
