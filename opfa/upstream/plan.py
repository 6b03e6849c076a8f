"""What a launch needs: memory of each GPU, bytes on the wire, time. README.md has the formulas."""

from collections.abc import Iterator, Mapping
from functools import partial

from opfa.errors import RecipeError
from opfa.report.tables import Result, Row, Table
from opfa.training.zero import OffloadOptimizer, ZeroOptimization
from opfa.upstream.formulas import (
    Shape,
    mask_update_bytes,
    measuring_operations,
    memory_bytes,
    operations,
    shape_of,
    wire_bytes,
)
from opfa.upstream.recipe import PretrainRecipe

FREE = 0.1  # share of a GPU's memory that is left to the allocator and the libraries
FILES = {  # of launch/, as far as the formulas look at them
    "zero0": ZeroOptimization(stage=0),
    "zero1": ZeroOptimization(stage=1),
    "zero2": ZeroOptimization(stage=2),
    "zero2-offload": ZeroOptimization(stage=2, offload_optimizer=OffloadOptimizer()),
    "zero3": ZeroOptimization(stage=3),
}


class Configuration(Row):
    """What a launch needs with one DeepSpeed file. `micro_batch` is None where nothing fits."""

    configuration: str
    micro_batch: int | None
    accumulation: int
    memory_gb: dict[str, float]
    total_memory_gb: float
    wire_gb_per_step: float
    mask_updates_share_of_wire: float
    seconds_per_step: float
    efficiency: float

    def cells(self) -> list[str]:
        """Its line in a table."""
        memory = f"{self.total_memory_gb:.1f}"
        if self.micro_batch is None:
            return [self.configuration, "too large", memory, "", "", ""]
        wire = f"{self.wire_gb_per_step:.2f}", f"{self.mask_updates_share_of_wire:.2%}"
        batch = f"{self.micro_batch} x {self.accumulation}"
        return [self.configuration, batch, memory, *wire, f"{self.efficiency:.0%}"]


class Plan(Result):
    """All configurations, and the fastest one that fits, with the largest micro-batch that does."""

    model: dict[str, int]
    gpus: int
    batch: int
    days: float | None
    configurations: list[Configuration]
    recommended: str | None
    measured_sequences: int = 0  # of text, by scores, at a time
    measured_seconds: float = 0.0
    measured_times: int = 0  # in the whole run

    def parts(self, *, is_long: bool = False) -> Iterator[Table | str]:
        """The table, and what to use."""
        head = ("DeepSpeed file", "batch", "GB each", "GB/step sent", "of it masks", "efficiency")
        rows = [row.cells() for row in self.configurations]
        yield Table(head, rows, f"{self.gpus} GPU(s), global batch {self.batch}")
        if self.recommended is None or self.days is None:
            yield "no configuration fits; give more GPUs or more memory"
            return
        best = next(r for r in self.configurations if r.configuration == self.recommended)
        file = f"launch/{self.recommended}.json" if self.recommended in FILES else self.recommended
        yield f"use: launch.deepspeed={file} launch.micro_batch={best.micro_batch}"
        time = f"{self.days:.1f} days" if self.days >= 1 else f"{24 * self.days:.1f} hours"
        yield f"about {time}, if sending never overlaps with computing"
        if self.measured_sequences:
            what = f"scores are measured on {self.measured_sequences:,} sequences"
            seconds = f"about {self.measured_seconds:.0f} s on every GPU"
            yield f"{what}, {seconds} at a time, {self.measured_times:,} time(s)"


def plan(
    recipe: PretrainRecipe, *, gpus: int, memory_gb: float, bandwidth_gbps: float, teraflops: float
) -> Plan:
    """Plan with the recipe's DeepSpeed file, or with each file of launch/ if it names none.

    `bandwidth_gbps` is Gbit/s of each GPU to the others, `teraflops` what a GPU sustains. Raises
    `RecipeError` for more GPUs than the global batch can feed.
    """
    batch = recipe.training.batch
    if batch % gpus:
        possible = [n for n in range(1, batch + 1) if batch % n == 0]
        near = sorted(possible, key=lambda n: abs(n - gpus))[:2]
        raise RecipeError(
            f"--gpus {gpus}: must divide training.batch = {batch}, which defines the result; near "
            f"are {' and '.join(str(n) for n in sorted(near))}, or use a recipe of another batch"
        )
    shape, given, steps = shape_of(recipe), recipe.launch.deepspeed, recipe.training.steps
    files: Mapping[str, ZeroOptimization] = FILES
    if given is not None:
        files = {given: recipe.deepspeed_file(gpus).zero_optimization}
    every = ramp.every if (ramp := recipe.ramp()) else 0
    times = recipe.pruning.measurements(steps) if recipe.pruning else 0
    speeds = {"bandwidth": bandwidth_gbps * 1e9 / 8, "rate": teraflops * 1e12}
    seconds = measuring_operations(shape) / speeds["rate"]
    rows = [
        _configuration(shape, name, zero, batch, gpus, memory_gb, every, **speeds)
        for name, zero in files.items()
        if zero.stage or shape.precision == "fp32"
    ]
    fitting = [row for row in rows if row.micro_batch]
    best = min(fitting, key=lambda row: row.seconds_per_step, default=None)
    return Plan(
        model={"parameters": shape.parameters, "pruned": shape.pruned, "teacher": shape.teacher},
        gpus=gpus,
        batch=batch,
        days=(best.seconds_per_step * steps + times * seconds) / 86400 if best else None,
        configurations=rows,
        recommended=best.configuration if best else None,
        measured_sequences=shape.measured,
        measured_seconds=seconds,
        measured_times=times,
    )


def _configuration(
    shape: Shape,
    name: str,
    zero: ZeroOptimization,
    batch: int,
    gpus: int,
    memory_gb: float,
    every: int,
    *,
    bandwidth: float,
    rate: float,
) -> Configuration:
    """`bandwidth` is bytes a second, `rate` operations a second; masks move each `every` steps."""
    share, most = batch // gpus, (1 - FREE) * memory_gb * 1e9
    memory = partial(memory_bytes, shape, zero, gpus=gpus)
    divisors = [n for n in range(share, 0, -1) if share % n == 0]
    micro_batch = next((n for n in divisors if sum(memory(micro_batch=n).values()) <= most), None)
    needed, accumulation = memory(micro_batch=micro_batch or 1), share // (micro_batch or 1)
    wire = wire_bytes(shape, stage=zero.stage, gpus=gpus, accumulation=accumulation)
    masks = mask_update_bytes(shape, stage=zero.stage, gpus=gpus) / every if every else 0.0
    compute = operations(shape, batch) / (gpus * rate)
    waiting = (wire + masks) / bandwidth
    if zero.offload_optimizer:  # gradients to the host and weights back, over PCI Express 4
        waiting += (4 + shape.width) * shape.parameters / gpus / 25e9
    return Configuration(
        configuration=name,
        micro_batch=micro_batch,
        accumulation=accumulation,
        memory_gb={key: value / 1e9 for key, value in needed.items()},
        total_memory_gb=sum(needed.values()) / 1e9,
        wire_gb_per_step=(wire + masks) / 1e9,
        mask_updates_share_of_wire=masks / (wire + masks) if wire else 0.0,
        seconds_per_step=compute + waiting,
        efficiency=compute / (compute + waiting),
    )
