"""What the schedules of a run ask of each step, for its pictures."""

from opfa.compression.schedules import LearningRate
from opfa.report.curves import Plan
from opfa.training.sections import Pruning


def plan(rates: LearningRate, pruning: Pruning | None) -> Plan:
    """The learning rate and the sparsity of each step."""
    sparsities = pruning.ramp(rates.steps).sparsities(rates.steps) if pruning else ()
    return Plan(learning_rate=rates.rates(), sparsity=sparsities)
