"""LoRA files: key names, reading and writing, remapping to a student, fusing into weights."""
