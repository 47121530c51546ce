"""The configurations that a study may try: a kernel's search space without what cannot run on the GPU.

A candidate is a :class:`Config` to kernels and a mapping of parameters to Optuna: the constants under their own names,
``num_warps`` and ``num_stages``. The values are categories to Optuna, so that a dashboard shows 128 as 128.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from optuna.distributions import CategoricalDistribution

from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Kernel, Space
from autotune.kernels.dependent import best_dependent
from runtimes.errors import UsageError

WARPS, STAGES = "num_warps", "num_stages"
Params = dict[str, int]
"""A candidate as Optuna stores it."""
Key = tuple[int, ...]
"""A candidate's values in the order of the parameters."""


def params_of(config: Config) -> Params:
    """A configuration as Optuna stores it."""
    return {**config.constants, WARPS: config.num_warps, STAGES: config.num_stages}


def config_of(params: Mapping[str, int]) -> Config:
    """The way back from :func:`params_of`."""
    constants = {name: value for name, value in params.items() if name not in (WARPS, STAGES)}
    return Config(constants=constants, num_warps=params[WARPS], num_stages=params[STAGES])


def narrowed(space: Space, gpu: Gpu) -> dict[str, tuple[int, ...]]:
    """The values of all parameters, without those of which only one is right on a GPU: they are nothing to search for."""
    values = {**space.constants, WARPS: space.num_warps, STAGES: space.num_stages}
    if (best := best_dependent(gpu)) in values.get("DEPENDENT", ()):
        values["DEPENDENT"] = (best,)
    return values


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What may be tried for one case on one GPU.

    Args:
        values: each parameter's values, in ascending order.
        fitting: the candidates that the kernel does not refuse.
        refused: how many others there are.
    """

    values: Mapping[str, tuple[int, ...]]
    fitting: tuple[Key, ...]
    refused: int

    @classmethod
    def of(cls, kernel: Kernel, case: Case, gpu: Gpu, space: Space | None = None) -> Candidates:
        """Everything that ``kernel`` lets run for ``case`` on ``gpu``, known without compiling.

        Args:
            space: a part of the kernel's space; None takes all of it.

        Raises:
            UsageError: nothing is left.
        """
        values = narrowed(space or kernel.space(case), gpu)
        names = tuple(values)[:-2]
        fitting: list[Key] = []
        reasons: list[str] = []
        for number, key in enumerate(itertools.product(*values.values())):
            if number % 64 == 0:
                time.sleep(0)  # a large space takes a second: other threads need not wait for Python's lock
            *constants, warps, stages = key
            config = Config(constants=dict(zip(names, constants, strict=True)), num_warps=warps, num_stages=stages)
            reason = kernel.refusal(case, config, gpu)
            if reason is None:
                fitting.append(key)
            else:
                reasons.append(reason)
        if not fitting:
            raise UsageError(
                f"none of the {len(reasons)} candidates of {kernel.name} for {case} fits {gpu.name}: {reasons[0]}"
            )
        return cls(values=values, fitting=tuple(fitting), refused=len(reasons))

    @cached_property
    def distributions(self) -> dict[str, CategoricalDistribution]:
        """What Optuna draws each parameter from."""
        return {name: CategoricalDistribution(values) for name, values in self.values.items()}

    def params(self, key: Key) -> Params:
        """The candidate as Optuna stores it."""
        return dict(zip(self.values, key, strict=True))

    def key(self, params: Mapping[str, int]) -> Key | None:
        """The candidate that ``params`` are; None where they are refused or are none of this space."""
        if params.keys() != self.values.keys():
            return None
        key = tuple(params[name] for name in self.values)
        return key if key in self._known else None

    def config(self, params: Mapping[str, int]) -> Config:
        """Parameters as a configuration, in the order of the space: a storage may give them in another."""
        return config_of({name: params[name] for name in self.values if name in params} | dict(params))

    def nearest(self, params: Mapping[str, int], among: Collection[Key]) -> list[Key]:
        """Those of ``among`` that lie the fewest steps from ``params``, along all parameters together.

        A value that is none of its parameter's counts as the one that is next to it.
        """
        steps_of = {name: {value: step for step, value in enumerate(values)} for name, values in self.values.items()}
        wanted = [steps[min(steps, key=lambda v: abs(v - params[name]))] for name, steps in steps_of.items()]

        def distance(key: Key) -> int:
            places = zip(steps_of.values(), key, wanted, strict=True)
            return sum(abs(steps[value] - place) for steps, value, place in places)

        distances = {key: distance(key) for key in among}
        least = min(distances.values())
        return [key for key, steps in distances.items() if steps == least]

    @cached_property
    def _known(self) -> frozenset[Key]:
        return frozenset(self.fitting)
