"""How much each open argument matters, by Optuna's evaluator."""

from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from lightning_optim.search.objectives import Objective
from lightning_optim.search.study import quietly

__all__ = ["importances"]

LEAST = 4
"""Fewer complete trials say nothing about importance."""


def importances(
    study: optuna.Study, objectives: Sequence[Objective], trials: Sequence[FrozenTrial]
) -> dict[str, dict[str, float]]:
    """Return the importance of each open argument for each objective, as fractions.

    The dense model has no arguments and takes no part. Optuna asks which arguments tell the best trials from the
    others: an argument that only moves bad ones has none.

    Args:
        study: Whose directions count.
        objectives: In the order of the study.
        trials: Of the study.

    References:
        Watanabe et al. 2023, "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in Arbitrary Subspaces",
        which is Optuna's default.
    """
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.params]
    if len(done) < LEAST:
        return {}
    found = {}
    with quietly():
        alone = optuna.create_study(directions=study.directions)
        alone.add_trials(done)
        for place, objective in enumerate(objectives):
            sign = 1.0 if objective.mode == "min" else -1.0  # the evaluator takes low values for good ones

            def target(trial: FrozenTrial, place: int = place, sign: float = sign) -> float:
                return sign * float(trial.values[place])

            shares = optuna.importance.get_param_importances(alone, target=target)
            found[objective.name] = {name: float(share) for name, share in shares.items()}
    return found
