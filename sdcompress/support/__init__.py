"""Shared helpers: settings files, pydantic's faults, the pipeline type, the console reporter, and the muting of library output."""
