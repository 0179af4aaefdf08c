"""LoRA files: their key names, reading and writing, remapping to a student, fusing into weights."""
