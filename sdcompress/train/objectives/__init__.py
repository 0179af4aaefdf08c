"""Training objectives, one file a loss."""
