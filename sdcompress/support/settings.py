"""The base class of settings that a person writes: recipes and suites."""

from __future__ import annotations

from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Settings(BaseModel):
    """Settings whose every fault is reported. Unknown keys, NaN, and true for a number are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, dict) and get_origin(annotation) is dict:
            value_parts: Any = value.values()
        else:
            value_parts = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(part, bool) for part in value_parts) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("input should be a number or text, got true or false")
        return value
