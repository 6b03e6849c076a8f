"""Where DeepSpeed keeps fp32 masters and moments, of which a rank holds runs, at every stage."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each weight


@dataclass
class Masters:
    """Runs of masters and moments, as views that may be written to."""

    engine: Any  # DeepSpeed's, which is not typed
    stage: int  # of ZeRO

    def run(self, parameter: Tensor, moment: str | None = None) -> tuple[Tensor, int]:
        """This rank's run of a master or moment, and where in the flattened parameter it starts."""
        place = self._place(parameter)
        if place is None:
            return torch.empty(0, device=self.engine.device), 0
        flat, offset, size, start = place
        tensor = flat if moment is None else self._states[flat][moment]
        return tensor.view(-1).narrow(0, offset, size), start

    def make_moments(self, parameters: Iterable[Tensor]) -> None:
        """What AdamW makes at its first step."""
        for parameter in parameters:
            place = self._place(parameter)
            if place is not None and MOMENTS[0] not in self._states[place[0]]:
                flat = place[0].detach()
                step = torch.zeros((), dtype=torch.float32, device=flat.device)
                zeros = {moment: torch.zeros_like(flat) for moment in MOMENTS}
                self._states[place[0]] = {"step": step, **zeros}

    @property
    def num_steps(self) -> float:
        """How many steps AdamW has made."""
        states = list(self._states.values())
        return float(states[0]["step"]) if states else 0.0

    @num_steps.setter
    def num_steps(self, value: float) -> None:
        for state in self._states.values():
            state["step"].fill_(value)

    @property
    def _states(self) -> Any:
        return self.engine.basic_optimizer.state

    def _place(self, parameter: Any) -> tuple[Tensor, int, int, int] | None:
        """The stepped tensor, offset and size in it, and start in the parameter; None: not here."""
        if self.stage == 0:
            return parameter, 0, parameter.numel(), 0
        optimizer = self.engine.optimizer
        if self.stage == 3:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = dist.get_rank() * parameter.ds_tensor.ds_numel
            size = min(size, parameter.ds_numel - start)  # the last run is padded
            flat = optimizer.fp32_partitioned_groups_flat[group]
            return (flat, offset, size, start) if size > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        masters = getattr(optimizer, "single_partition_of_fp32_groups", None)
        if masters is None:  # stage 1 in bf16 is a class of its own
            masters = optimizer.fp32_groups_flat_partition
        address = mapping.hp_fragment_address
        flat = masters[mapping.param_group_index]
        return flat, address.start, address.numel, mapping.lp_fragment_address.start
