"""Which candidate comes next."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState

from autotune.candidates import Candidates, Key, config_of
from autotune.sampler import REASON, SET_ASIDE, CandidateSampler, Kind, counts, taken
from tests.autotune.tiny import CASE, H100, Double, true_us

ALL = Candidates.of(Double(), CASE, H100)


def a_study(kind: Kind, seed: int = 0) -> optuna.Study:
    return optuna.create_study(sampler=CandidateSampler(ALL, kind, seed))


def ask(study: optuna.Study) -> tuple[optuna.Trial, Key | None]:
    trial = study.ask(dict(ALL.distributions))
    return trial, ALL.key(trial.params)


@pytest.mark.parametrize("kind", ["tpe", "random", "grid"])
def test_every_candidate_comes_once(kind: Kind) -> None:
    study = a_study(kind)
    seen = []
    for _ in ALL.fitting:
        trial, key = ask(study)
        assert key is not None
        seen.append(key)
        study.tell(trial, true_us(config_of(trial.params)))
    assert sorted(seen) == sorted(ALL.fitting)


def test_running_and_waiting_candidates_are_not_proposed_again() -> None:
    study = a_study("random")
    study.enqueue_trial(ALL.params(ALL.fitting[0]))
    waits = taken(ALL, study.get_trials())
    assert waits == {ALL.fitting[0]}
    seen = [ask(study)[1] for _ in ALL.fitting]
    assert seen[0] == ALL.fitting[0]
    assert sorted(filter(None, seen)) == sorted(ALL.fitting)
    assert ask(study)[1] in ALL.fitting, "where another worker took the last, its twin comes"


def test_only_a_failure_of_its_own_takes_a_candidate() -> None:
    study = a_study("random")
    for attribute in (REASON, SET_ASIDE, None):
        trial, _ = ask(study)
        if attribute is not None:
            trial.set_user_attr(attribute, "why")
        study.tell(trial, state=TrialState.FAIL)
    own, aside, stale = study.get_trials()
    assert [counts(trial) for trial in (own, aside, stale)] == [True, False, False]
    assert taken(ALL, study.get_trials()) == {ALL.key(own.params)}


def found_after(kind: Kind, seed: int) -> int:
    """Trials until the best candidate was found."""
    study = a_study(kind, seed)
    for count in range(1, len(ALL.fitting) + 1):
        trial, _ = ask(study)
        value = true_us(config_of(trial.params))
        study.tell(trial, value)
        if value == 10.0:
            return count
    raise AssertionError("the best candidate was not proposed")


def test_tpe_finds_the_best_sooner_than_chance() -> None:
    counts_of_tpe = [found_after("tpe", seed) for seed in range(5)]
    assert sorted(counts_of_tpe)[2] <= len(ALL.fitting) // 2 - 1
    assert max(counts_of_tpe) < len(ALL.fitting)


def test_a_seed_repeats_the_draws() -> None:
    assert found_after("tpe", 3) == found_after("tpe", 3)
