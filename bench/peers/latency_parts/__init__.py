"""The parts of `bench/peers/latency.py`. They run in several environments, so they import packages only where used."""
