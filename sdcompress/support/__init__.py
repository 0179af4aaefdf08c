"""Shared helpers: settings files, the pipeline type, the console reporter, and the muting of library output."""
