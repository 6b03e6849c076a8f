"""The DeepSpeed engine, and the only file that names it. README.md has what was measured of it."""

import contextlib
import io
import logging
import math
import os
import socket
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from opfa.compression.runs import Weights
from opfa.compression.selection import Ranks
from opfa.errors import RunError
from opfa.extras import importing
from opfa.models.encoders import choose_accelerator
from opfa.sparsity.layers import MaskedLinear
from opfa.training import launch
from opfa.training.distributed import gather_texts
from opfa.training.masters import MOMENTS, Masters
from opfa.training.state import Piece, Pieces, save_pieces
from opfa.training.zero import DeepSpeedFile

ALWAYS = {  # and stage 3 would replace torch's linear function for good, by one that rounds twice
    "round_robin_gradients": False,
    "memory_efficient_linear": False,
}
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of fp16's loss


def start_distributed(timeout_seconds: float) -> torch.device:
    """Join the launcher's process group, or make one of this process alone; the device to use."""
    accelerated = choose_accelerator() == "cuda"
    if not (launch.has_rendezvous() or dist.is_initialized()):
        os.environ.update(_alone())  # RANK may be there for another purpose
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    # Imported here, since DeepSpeed reads DS_ACCELERATOR while it is imported.
    with importing("pre-training", "opfa[pretrain]"):
        import deepspeed.ops
        from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not accelerated:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        deepspeed.init_distributed(
            "nccl" if accelerated else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=2 * timeout_seconds),  # the supervisor speaks first
        )
    if not accelerated:
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _alone() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return {**one, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


class Engine(Weights):
    """A model, its optimizer and its shards. Every rank makes the same calls in the same order."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        epsilon: float,
        max_grad_norm: float,
        micro_batch: int,
        accumulation: int,
        precision: str,
        file: DeepSpeedFile,
    ) -> None:
        """Wrap a model whose modules will not be swapped any more. Collective."""
        import deepspeed
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
        from deepspeed.utils import set_z3_leaf_modules

        accelerator: Any = deepspeed.get_accelerator()
        if precision == "fp16" and not accelerator.is_fp16_supported():
            raise RunError("training.precision = 'fp16': not on this machine; use bf16 or fp32")
        config: dict[str, Any] = {
            **file.values(),
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": max_grad_norm,
            "steps_per_print": 10**9,
            "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice a pass
            "bf16": {"enabled": precision == "bf16", "immediate_grad_update": True},
            "fp16": {"enabled": precision == "fp16"},
            "zero_force_ds_cpu_optimizer": False,  # torch's is as fast there, and needs no compiler
        }
        config["zero_optimization"] |= ALWAYS
        if precision != "fp32":
            config["data_types"] = {"grad_accum_dtype": "fp32"}
            config.setdefault("communication_data_type", "fp32")
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=epsilon, fused=True)
        self.module = model  # its parameters may become 16-bit or shards
        if file.stage == 3:
            lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
            set_z3_leaf_modules(model, [type(module) for modules in lists for module in modules])
        with contextlib.redirect_stdout(io.StringIO()):  # it prints memory reports at stage 1
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self._engine: Any = engine  # Any: DeepSpeed is not typed
        self._stage = file.stage
        self._is_fp16 = precision == "fp16"
        if isinstance(engine.optimizer, BF16_Optimizer) and dist.get_world_size() == 1:
            engine.enable_backward_allreduce = False  # it would only copy all gradients twice
        self._masters = Masters(engine, file.stage)
        self._parameters = dict(model.named_parameters())
        if self._stage > 0 and dist.get_world_size() > 1:  # else every rank holds everything
            self.ranks = Ranks(dist.get_rank(), dist.get_world_size(), self._total)

    def __call__(self, *inputs: Any) -> Any:  # Any: whatever the model takes and gives
        """One forward pass."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate the gradient of this rank's share of the global batch's loss."""
        # DeepSpeed divides by both; a loss that is not finite makes all gradients so, for `step`.
        scale = self._engine.gradient_accumulation_steps() * dist.get_world_size()
        self._engine.backward(loss * (scale + 0 * loss.detach()))
        if not is_last:
            self._engine.step()

    def step(self, learning_rate: float) -> Tensor | None:
        """One optimizer step; the gradient norm before clipping, which a GPU may still compute.

        A gradient that is not finite changes nothing: None in fp16, where the step is skipped and
        the loss scale halved; else `RunError`, on every rank.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._stage == 0:
            # DeepSpeed clips there too, but neither tells the norm nor minds what it is.
            gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            if is_finite := math.isfinite(norm):
                self._engine.step()
        else:
            self._engine.step()  # skipped when gradients are not finite
            is_finite = not self._engine.optimizer.overflow
            norm = torch.as_tensor(self._engine.get_global_grad_norm())
        if is_finite:
            return norm
        if self._is_fp16:
            return None
        raise RunError("the gradient is not finite; nothing was changed by this step")

    @property
    def has_whole_weights(self) -> bool:
        """Whether parameters are whole between passes, and not only inside."""
        return self._stage < 3

    # runs of masters and moments

    def read(self, parameter: Tensor) -> Tensor:
        """This rank's run of a parameter's fp32 master, [n]; never 16-bit values."""
        return self._masters.run(parameter)[0].detach()

    def read_gradient(self, layer: MaskedLinear) -> Tensor:
        """This rank's run of the batch's gradient by a layer's effective weight. Collective."""
        whole = layer.take_gradient()  # on every rank and at every stage: DeepSpeed's are masked
        dist.all_reduce(whole)
        scale = self._engine.optimizer.loss_scaler.cur_scale if self._is_fp16 else 1.0
        return self.cut(layer.weight, whole.div_(dist.get_world_size() * scale))

    def join(self, parameter: Tensor, run: Tensor) -> Tensor:
        """The whole tensor from every rank's run of it, bit for bit. Collective."""
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if self._stage == 0:
            return run.view(shape)
        bits = {4: torch.int32, 1: torch.uint8}[run.element_size()]  # integers sum exactly
        whole = torch.zeros(shape.numel(), dtype=bits, device=self._engine.device)
        start = self._masters.run(parameter)[1]
        whole[start : start + run.numel()] = run.view(bits)
        dist.all_reduce(whole)
        return whole.view(run.dtype).view(shape)

    def cut(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """This rank's run, [n], of a tensor in the parameter's shape."""
        run, start = self._masters.run(parameter)
        return whole.view(-1)[start : start + run.numel()].to(run.device)

    def write(self, parameter: Tensor, whole: Tensor) -> None:
        """Give a parameter another fp32 value: its master, and what the forward pass uses."""
        run, start = self._masters.run(parameter)
        run.copy_(self.cut(parameter, whole))
        self._set_working_copy(parameter, whole.reshape(-1), start, run.numel())

    def whole(self, parameter: Tensor) -> Tensor:
        """The full fp32 value of a parameter. Collective."""
        return self.join(parameter, self.read(parameter))

    def compare(self, text: str) -> list[str]:
        """This text of every rank. Collective."""
        return gather_texts(text)

    def _total(self, counts: np.ndarray) -> np.ndarray:
        total = torch.from_numpy(counts).to(self._engine.device)
        dist.all_reduce(total)
        return total.cpu().numpy()

    # resume points

    @property
    def num_files(self) -> int:
        """How many ranks write something in `save`."""
        return self.ranks.size

    def save(self, directory: Path) -> None:
        """Write this rank's runs under `directory`."""
        if self._stage == 0 and dist.get_rank() > 0:
            return
        self._masters.make_moments(self._parameters.values())
        scaler = self._engine.optimizer.loss_scaler if self._is_fp16 else None
        scale = {key: getattr(scaler, key) for key in SCALER if hasattr(scaler, key)}
        facts = {"adam_step": self._masters.num_steps, "scale": scale}
        save_pieces(directory / f"state-{dist.get_rank():05d}.safetensors", self._pieces(), facts)

    def _pieces(self) -> Iterator[Piece]:
        for name, parameter in self._parameters.items():
            for moment in (None, *MOMENTS):
                values, start = self._masters.run(parameter, moment)
                if values.numel():
                    yield Piece(f"{moment or 'master'}/{name}", start, values.detach())

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Read what any number of ranks wrote with `save`, at any stage."""
        saved = Pieces(directory, "state-*.safetensors")
        self._masters.make_moments(self._parameters.values())
        for name, parameter in self._parameters.items():
            size = getattr(parameter, "ds_numel", parameter.numel())
            self.write(parameter, saved.whole(f"master/{name}", size))
            for moment in MOMENTS:
                run, start = self._masters.run(parameter, moment)
                run.copy_(saved.whole(f"{moment}/{name}", size)[start : start + run.numel()])
        self._masters.num_steps = saved.facts["adam_step"]
        for key, value in saved.facts["scale"].items():
            setattr(self._engine.optimizer.loss_scaler, key, value)

    def _set_working_copy(self, parameter: Any, value: Tensor, start: int, size: int) -> None:
        """The values that the forward pass uses follow their masters."""
        if self._stage == 3:
            parameter.ds_tensor.data[:size].copy_(value[start : start + size])
        if parameter.numel() == value.numel():  # at stage 3 only small ones are kept whole
            parameter.data.copy_(value.view(parameter.shape))
