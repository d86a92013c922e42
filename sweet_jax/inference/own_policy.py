"""Operating points of a saved model for a policy that it was not calibrated for.

Shape letters: R replica, E exit, N examples.
"""

import dataclasses

import numpy as np

from sweet_jax.errors import UserError
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.policies import PolicyFunction, policy_name
from sweet_jax.files import read_json
from sweet_jax.inference.artifact import ModelArtifact


def calibrate_policy(model: ModelArtifact, policy: str | PolicyFunction) -> ModelArtifact:
    """Returns a model with the operating points of an additional policy.

    They are fitted on the outputs for the run's calibration rows, which are in the folder of the
    run, next to its folder model/. Raises UserError if they are not there, or if the model runs in
    int8 or has been recalibrated.
    """
    name, run = policy_name(policy), model.folder.parent
    outputs = run / "exit_outputs" / "calibration.npz"
    if not outputs.exists():
        raise UserError(
            f"this model was not calibrated for the policy {name!r}, and {str(outputs)!r}, which "
            "calibrating it now needs, does not exist: pass threshold=, or train with the policy "
            "as config.confidence"
        )
    try:
        best = int(read_json(run / "results.json")["best_replica"])
        every = ExitOutputs.load(outputs)
        rows = every.replica(best)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{str(run)!r} is not the run of this model ({error!r}): pass threshold=, or the "
            "folder model/ in its run"
        ) from error
    tuned = (run / "exit_outputs" / "tuning.npz").exists()
    fitted = make_resolver(rows, (policy,), 1 if tuned else len(every.logits))
    saved, new = (r.calibrator.temperatures for r in (model.resolver, fitted))
    if saved.shape != new.shape or not np.allclose(saved, new, equal_nan=True):
        raise UserError(
            f"the calibration rows in {str(run)!r} do not fit this model, which was recalibrated "
            f"or runs in int8: pass threshold= with the policy {name!r}"
        )
    fronts, losses = {**model.resolver.fronts, **fitted.fronts}, dict(model.resolver.losses)
    resolver = dataclasses.replace(model.resolver, fronts=fronts, losses=losses | {**fitted.losses})
    return dataclasses.replace(model, resolver=resolver)
