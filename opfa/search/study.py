"""The search itself, by optuna: generations of shapes, asked for, judged and told.

What evaluation i tries depends on the recipe's seed, on i and on the generations before it. A whole
generation is asked for before any of it is judged. So neither workers nor interruptions change what
is tried: what a killed process had asked for and not told is asked for again.

An evaluation is a shape that is judged. One that came up before is not judged again: another one is
drawn in its place.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opfa.extras import importing
from opfa.recipe import Seed
from opfa.search.recipe import Search
from opfa.search.shapes import Shape, Space

with importing("opfa search", "opfa[search]"):
    import optuna
    from optuna.distributions import BaseDistribution, IntDistribution
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler
    from optuna.samplers.nsgaii import PolynomialMutation
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.study import StudyDirection
    from optuna.trial import FrozenTrial, Trial, TrialState

JOURNAL = "journal.log"
NAME = "search"
PLACE, METRICS = "place", "metrics"  # what a trial notes: which evaluation it is, and its metrics
MUTATED = 1  # number of a shape, on average
SPREAD = 5.0  # of mutations, Deb's eta; more is nearer to where it was
DRAWS = 50  # for one evaluation, until all shapes are taken to be known
Metrics = Mapping[str, float]
Params = Mapping[str, int]


@dataclass(frozen=True)
class Evaluation:
    """A shape that was judged; `excess` is by how much it misses limits, each as a share."""

    place: int
    shape: Shape
    metrics: Metrics
    costs: Mapping[str, float]
    excess: Mapping[str, float]

    @property
    def is_feasible(self) -> bool:
        """Whether it keeps to all limits."""
        return all(share <= 0 for share in self.excess.values())

    def values(self, search: Search, metric: str) -> tuple[float, ...]:
        """What should be low: the costs that are aims, and the metric's negative."""
        return (*(self.costs[aim] for aim in search.aims), -self.metrics[metric])


class Asked:
    """A shape that is to be judged."""

    def __init__(self, trial: Trial, place: int, shape: Shape) -> None:
        """For evaluation `place`."""
        self.trial, self.place, self.shape = trial, place, shape


class Study:
    """Evaluations so far, in a journal on the disk, and what comes next."""

    def __init__(
        self, output: Path, search: Search, space: Space, seeds: list[Shape], seed: Seed
    ) -> None:
        """Open the journal in a directory, or begin one."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._search, self._space, self._seed = search, space, seed
        self._seeds = [*seeds[: search.seeds], *(space.even if search.even else ())]
        path = output / JOURNAL
        _mended(path)
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))),
            study_name=NAME,
            directions=[StudyDirection.MINIMIZE] * (len(search.aims) + 1),
            load_if_exists=True,
        )
        self._distributions: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(steps) - 1) for name, steps in space.steps.items()
        }
        self._forget_unfinished()
        self.is_exhausted = False

    def _forget_unfinished(self) -> None:
        """What a killed process left is asked for again, by the same numbers."""
        for trial in self._trials(TrialState.RUNNING):
            self._study.tell(trial.number, state=TrialState.FAIL)

    def _trials(self, state: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(state,))

    def done(self) -> dict[int, tuple[Shape, Metrics]]:
        """The evaluations so far, by their places."""
        return {
            trial.user_attrs[PLACE]: (self._space.shape(trial.params), trial.user_attrs[METRICS])
            for trial in self._trials(TrialState.COMPLETE)
        }

    def generations(self) -> Iterator[list[Asked]]:
        """What is still to be judged, by generations. All of one must be told before the next."""
        size, num = self._search.population, self._search.evaluations
        for start in range(0, num, size):
            known = self.done()
            places = [p for p in range(start, min(start + size, num)) if p not in known]
            shapes = {shape for shape, _ in known.values()}
            asked = []
            for place in places:
                if (one := self._ask(place, shapes)) is None:
                    self.is_exhausted = True
                    break
                shapes.add(one.shape)
                asked.append(one)
            if asked:
                yield asked
            if self.is_exhausted:
                return

    def _ask(self, place: int, known: set[Shape]) -> Asked | None:
        """A new shape; None where none comes up any more."""
        for draw in range(DRAWS):
            self._study.sampler = self._sampler(place, draw)
            trial = self._study.ask(self._distributions)
            shape = self._space.shape(trial.params)
            if shape not in known:
                trial.set_user_attr(PLACE, place)
                return Asked(trial, place, shape)
            self._study.tell(trial, state=TrialState.FAIL)
        return None

    def _sampler(self, place: int, draw: int) -> BaseSampler:
        """One whose next draw depends on these numbers, and on the generations before."""
        given = None
        if place < len(self._seeds) and not draw:
            given = self._space.params(self._seeds[place])
        seed = int(np.random.SeedSequence((self._seed, place, draw)).generate_state(1)[0])
        if self._search.sampler == "random" and given is None:
            return RandomSampler(seed=seed)
        return Breeding(self._search, len(self._distributions), seed, given)

    def tell(self, asked: Asked, found: Evaluation, metric: str) -> None:
        """Note what an evaluation found."""
        for name, excess in found.excess.items():
            asked.trial.set_constraint(name, excess)
        asked.trial.set_user_attr(METRICS, dict(found.metrics))
        self._study.tell(asked.trial, list(found.values(self._search, metric)))


class Breeding(NSGAIISampler):
    """NSGA-II, whose first generation may have seeds among its members. (optuna's own queue would
    leave them out of the population.)
    """

    def __init__(self, search: Search, num_params: int, seed: int, given: Params | None) -> None:
        """For one draw: bred from the generations before, or `given`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # this mutation is new in optuna
            mutation = PolynomialMutation(eta=SPREAD)
        share = min(1.0, MUTATED / max(1, num_params))
        size = search.population
        super().__init__(population_size=size, mutation=mutation, mutation_prob=share, seed=seed)
        self._given = given

    def select_parent(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        """By their numbers, as they are when they are read back from the journal."""
        return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:  # Any: as optuna has them
        """A number that nothing is bred for."""
        if self._given is not None:
            return self._given[param_name]
        return super().sample_independent(study, trial, param_name, param_distribution)


def _mended(path: Path) -> None:
    """Take from a journal what a process left that was killed: its lock, and half a line."""
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])
