"""What a server takes: its address, batches, and everything that is bounded."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opfa.errors import RunError

MEGABYTE = 10**6
Seconds = Annotated[float, Field(gt=0.0, le=3_600.0)]


class Limits(BaseModel):
    """All options of a server but those of its model. Frozen; a wrong value raises `RunError`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65_535)  # 0: one that is free
    batch: int = Field(default=32, ge=1, le=1 << 16)  # examples that are computed at once
    wait_ms: float = Field(default=2.0, ge=0.0, le=10_000.0)  # for more of them
    queue: int = Field(default=1_024, ge=1, le=1 << 20)  # examples that wait
    body_mb: float = Field(default=1.0, gt=0.0, le=1_000.0)  # of a request, 10^6 bytes
    read_seconds: Seconds = 10.0  # until headers are there, and then the body
    answer_seconds: Seconds = 30.0  # until a request is answered that was read

    @property
    def body_bytes(self) -> int:
        """The most bytes of a body."""
        return int(self.body_mb * MEGABYTE)

    @classmethod
    def of(cls, **values: object) -> "Limits":
        """Checked values; the error names the option."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0])
            option = f"--{name.replace('_', '-')}"
            raise RunError(f"{option} {values[name]!r}: {first['msg']}") from None
