"""What every section of a recipe is: frozen, strict, and able to say which of its fields shape a result."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

UNSHAPING = "no part of a result's identity"
"""Marks a field (Annotated[int, UNSHAPING]) that says how the work is done and leaves what comes out as it is."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def shaping(self) -> dict[str, Any]:
        """The values that shape a stage's result: every field but those marked UNSHAPING."""
        unshaping = {name for name, field in type(self).model_fields.items() if UNSHAPING in field.metadata}
        return self.model_dump(mode="json", exclude=unshaping)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take `steps: yes` for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("input should not be true or false")
        return value
