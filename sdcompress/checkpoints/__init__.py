"""Single-file checkpoints in the LDM layout: identified, read and written."""
