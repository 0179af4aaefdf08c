"""Shared helpers: YAML, pydantic's faults, the pipeline type, the console reporter, and the muting of libraries."""
