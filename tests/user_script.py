"""What a user may write: a test lets mypy read it, and compares what it says with `# error`."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from pathlib import Path

import opfa
from opfa.api.results import FinetuneResult, PruneResult


def prune_and_tune(name: str, output: Path) -> float:
    pruned: PruneResult = opfa.prune(name, 0.9, output / "sparse", scope="global")
    print(pruned.zeros / pruned.size, pruned.markdown())
    overrides = {"model.init": output / "sparse", "training.epochs": 0.1, "distillation": None}
    result = opfa.finetune("sst2.toml", output / "run", overrides, seeds=2)
    if isinstance(result, FinetuneResult):
        print(result.seed)
    small = opfa.calibrate(result.model, "sst2.toml", output / "small", ["task.train=a.csv"])
    onnx = opfa.export(small.model, output / "a.onnx", precision="int8")
    if onnx.parity is not None:
        print(onnx.parity.max_difference)
    return result.metrics["accuracy"]


def train(name: str) -> list[tuple[int, int]]:
    model = opfa.load(name)
    print(model.config.num_labels, opfa.prune(model, 0.9).sparsity)
    opfa.lock(model)
    opfa.fuse(model)
    callback = opfa.PruningCallback(0.9, start=0.1, end=0.5, every=100)
    guard = opfa.SparsityGuard(every_steps=10)
    print(callback, guard)
    return [(update.step, update.zeros) for update in callback.updates]


def pass_on(run: str) -> str | None:
    try:
        released = opfa.release(run, "out", format="compact-int8", compare={"dense": "runs/0"})
        print([model.name for model in opfa.list_models()], opfa.inspect("out")["total"])
    except opfa.OpfaError as error:
        return str(error)
    return released.address


def mistakes(run: str) -> None:
    opfa.prune(sparsity="x")  # error: call-overload
    opfa.prune(run, 0.9, "out", scope="rows")  # error: call-overload
    opfa.finetune("a.toml", "run", seed=3)  # error: call-arg
    opfa.finetune("a.toml", 3)  # error: arg-type
    opfa.release(run, "out", format="small")  # error: arg-type
    print(opfa.evaluate(run, "a.toml").accuracy)  # error: attr-defined
    opfa.prunee(run)  # error: attr-defined
    opfa.PruningCallback("90 %")  # error: arg-type
