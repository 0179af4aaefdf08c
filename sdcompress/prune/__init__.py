"""Block pruning: the plan, the student that it builds, and its cost."""
