"""Where a pipeline comes from: found, loaded, drawn at random, or built in."""
