"""Pipelines: located, described, loaded, built with random weights, or built in."""
