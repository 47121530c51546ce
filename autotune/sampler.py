"""Which candidate comes next: never one that is refused, never one that was tried.

``tpe`` asks Optuna's multivariate TPE sampler, and where that draws a candidate that was tried or does not fit, draws again and
then takes the nearest that is free. One time in three it takes a free neighbour of the fastest instead: to TPE values are names,
which it cannot see to lie side by side. ``random`` and ``grid`` take any free one; a grid ends when none is left.

Source: Bergstra et al., Algorithms for Hyper-Parameter Optimization (2011); Watanabe (arXiv 2304.11127) for what TPE's settings do.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from autotune.candidates import Candidates, Key, Params

Kind = Literal["tpe", "grid", "random"]
RANDOM_FIRST = 5
"""Trials that TPE wants to see before it begins. With Optuna's 10 it finds the best of a hundred candidates later (bench/tuning.py)."""
DRAWS = 10
"""How often TPE is asked again."""
NEIGHBOURS = 1 / 3
"""Share of the candidates that are a neighbour of the fastest so far. In made-up landscapes of 150 candidates, one to four of them within
3% of the best, the median study then tried 10% until it found one of those, in the place of 13%."""
SET_ASIDE = "set_aside"
"""The trial attribute that says why a failed trial is none of the study's: its candidate is free again."""
REASON = "reason"
"""The trial attribute that says why a trial was pruned or failed."""


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of the study's: it is running, was timed or pruned, or failed for a reason of its own."""
    if trial.state == TrialState.FAIL:
        return REASON in trial.user_attrs and SET_ASIDE not in trial.user_attrs
    return trial.state != TrialState.WAITING


def proposed(trial: FrozenTrial) -> Params:
    """A trial's parameters; those that it was enqueued with, if it still waits."""
    return trial.params or trial.system_attrs.get("fixed_params", {})


def taken(candidates: Candidates, trials: Iterable[FrozenTrial]) -> set[Key]:
    """The candidates that need no further trial: tried, running or waiting."""
    keys = (candidates.key(proposed(t)) for t in trials if counts(t) or t.state == TrialState.WAITING)
    return {key for key in keys if key is not None}


class CandidateSampler(BaseSampler):
    """Proposes whole candidates.

    Args:
        kind: how the next one is chosen.
        seed: None draws one, so that the workers of a study differ.
    """

    def __init__(self, candidates: Candidates, kind: Kind, seed: int | None = None) -> None:
        self.candidates = candidates
        self._random = random.Random(seed)
        self._tpe: TPESampler | None = None
        if kind == "tpe":
            self._tpe = TPESampler(multivariate=True, constant_liar=True, n_startup_trials=RANDOM_FIRST, seed=seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self.candidates.distributions)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trials = study.get_trials(deepcopy=False)
        tried = taken(self.candidates, trials)
        free = [key for key in self.candidates.fitting if key not in tried]
        if not free:  # another worker took the last one: whoever asked finds its twin and sets this trial aside
            free = list(self.candidates.fitting)
        fastest = self._fastest(trials)
        if fastest is not None and self._random.random() < NEIGHBOURS:
            return self._near(fastest, free)
        last: Params | None = None
        allowed = frozenset(free)
        for last in self._drawn(trials, search_space):
            if self.candidates.key(last) in allowed:
                return dict(last)
        return self._near(last, free) if last is not None else self.candidates.params(self._random.choice(free))

    def _near(self, params: Params, free: list[Key]) -> Params:
        return self.candidates.params(self._random.choice(self.candidates.nearest(params, free)))

    def _fastest(self, trials: Iterable[FrozenTrial]) -> Params | None:
        """Of those that were timed; None where TPE is not asked, or nothing was."""
        timed = [trial for trial in trials if trial.state == TrialState.COMPLETE and counts(trial)]
        if self._tpe is None or not timed:
            return None
        return min(timed, key=lambda trial: trial.value or 0.0).params

    def _drawn(self, trials: list[FrozenTrial], search_space: dict[str, BaseDistribution]) -> Iterator[Params]:
        """What TPE draws, again and again, from a copy of the study in memory: a database is read once a trial."""
        if self._tpe is None or sum(trial.state.is_finished() for trial in trials if counts(trial)) < RANDOM_FIRST:
            return
        copy = optuna.create_study()
        copy.add_trials([trial for trial in trials if counts(trial) and trial.params.keys() == search_space.keys()])
        copy.ask()
        [*_, asked] = copy.get_trials(deepcopy=False)
        for _ in range(DRAWS):
            drawn = self._tpe.sample_relative(copy, asked, search_space)
            if not drawn:
                return
            yield drawn

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError(f"`{param_name}` is no parameter of the search space")

    def reseed_rng(self) -> None:
        self._random.seed()
        if self._tpe is not None:
            self._tpe.reseed_rng()
