"""The part of a DeepSpeed configuration file that a launch may choose: how state is shared out.

What the recipe decides is refused by name, and so are options under which zeros or fp32 masters
could not be held exactly.
"""

import json
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from opfa.errors import RecipeError, brief, first_line
from opfa.recipe import Recipe, Section, read_small

IN_THE_RECIPE = {
    "train_batch_size": "training.batch",
    "train_micro_batch_size_per_gpu": "launch.micro_batch",
    "gradient_accumulation_steps": "training.batch / (launch.micro_batch x processes)",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "[training]",
    "scheduler": "[training]",
    "bf16": "training.precision",
    "fp16": "training.precision",
}
NOT_EXACT = {
    "round_robin_gradients": "it breaks the map to fp32 masters, by which masks are computed",
    "offload_param": "masks under offloaded parameters are not tested",
    "zero_quantized_weights": "it rounds weights",
    "zero_quantized_gradients": "it rounds gradients",
}


def _whole(text: str) -> int | float:
    """5e8, as DeepSpeed's pages write sizes, is a whole number."""
    value = float(text)
    return int(value) if value.is_integer() else value


class OffloadOptimizer(Section):
    """Optimizer state in host memory."""

    device: Literal["cpu"] = "cpu"
    pin_memory: bool = False


class ZeroOptimization(Section):
    """DeepSpeed's `zero_optimization`, sizes in elements; what is left out keeps its default."""

    stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: OffloadOptimizer | None = None
    overlap_comm: bool | None = None
    contiguous_gradients: bool | None = None
    reduce_scatter: bool | None = None
    reduce_bucket_size: int | None = Field(default=None, ge=1)
    allgather_partitions: bool | None = None
    allgather_bucket_size: int | None = Field(default=None, ge=1)
    sub_group_size: int | None = Field(default=None, ge=1)
    stage3_prefetch_bucket_size: int | None = Field(default=None, ge=0)
    stage3_param_persistence_threshold: int | None = Field(default=None, ge=0)
    stage3_max_live_parameters: int | None = Field(default=None, ge=0)
    stage3_max_reuse_distance: int | None = Field(default=None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _refuse_inexact(cls, values: Any) -> Any:  # Any: before it is checked
        if not isinstance(values, dict):
            return values
        for key in set(values) & set(NOT_EXACT):
            if values[key] not in (False, None):
                raise ValueError(f"{key} = {values[key]!r}: not with opfa: {NOT_EXACT[key]}")
        return {k: v for k, v in values.items() if k not in NOT_EXACT}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.offload_optimizer is not None and self.stage == 0:
            raise ValueError("offload_optimizer: needs stage 1, 2 or 3")
        return self


class DeepSpeedFile(Recipe):
    """A DeepSpeed configuration (JSON), as far as it is a matter of the launch."""

    zero_optimization: ZeroOptimization = ZeroOptimization()
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    wall_clock_breakdown: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_the_recipes(cls, values: Any) -> Any:  # Any: before it is checked
        for key in set(values) & set(IN_THE_RECIPE) if isinstance(values, dict) else ():
            raise ValueError(f"{key}: belongs to the recipe, as {IN_THE_RECIPE[key]}")
        return values

    @classmethod
    def load(cls, path: str | None, processes: int = 1) -> Self:
        """Read a file, or take ZeRO 2, and ZeRO 1 for a process alone. Raises `RecipeError`."""
        if path is None:
            return cls(zero_optimization=ZeroOptimization(stage=1 if processes == 1 else 2))
        where = f"launch.deepspeed = {brief(path)!r}"
        try:
            values = json.loads(read_small(path, where, "file"), parse_float=_whole)
        except (ValueError, OverflowError, RecursionError) as error:
            what = first_line(error)
            raise RecipeError(f"{where}: can't read this file: not JSON: {what}") from error
        if not isinstance(values, dict):
            raise RecipeError(f"{where}: must hold a JSON object")
        return cls.check(values, where)

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return self.zero_optimization.stage

    def values(self) -> dict[str, Any]:
        """What is said, in DeepSpeed's terms."""
        return self.model_dump(mode="json", exclude_none=True)
