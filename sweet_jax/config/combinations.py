"""Checks of the config for values that cannot be combined."""

import math

from sweet_jax.config.keys import Keys
from sweet_jax.errors import UserError, join_numbers
from sweet_jax.exits.policies import policy_rule
from sweet_jax.methods import LOSS_WEIGHTS, METHODS
from sweet_jax.objectives import OBJECTIVES


def check_combinations(config: Keys) -> None:
    """Raises UserError for values that cannot be combined."""
    least = 0 if config.head_init == "probe" or config.head_refit else 1
    if isinstance(config.epochs, int) and config.epochs < least:
        raise UserError(
            'epochs must be 1 or more, or "auto" (0 only with head_init=probe or head_refit); '
            f"got {config.epochs!r}"
        )
    _check_layer_scaling(config)
    _check_isolation(config)
    _check_loss_weights(config)
    _check_last_exit(config)
    _check_conflict(config)
    _check_independent(config)
    _check_learning_to_exit(config)
    _check_objective(config)


def _check_objective(config: Keys) -> None:
    """Raises UserError for keys that do not apply to the config's objective."""
    objective = config.objective
    for key, value, needed in (
        ("class_weights", config.class_weights, "single_label"),
        ("focal_gamma", config.focal_gamma, "single_label"),
        ("decision_thresholds", config.decision_thresholds, "multi_label"),
    ):
        if value and objective != needed:
            raise UserError(
                f"{key}={value!r} applies only to objective={needed}; this run has "
                f"objective={objective}: remove it"
            )
    if config.class_weights not in ("", "balanced"):
        weights = _as_numbers(config.class_weights)
        if not weights or not all(0 < w < math.inf for w in weights):
            raise UserError(
                'class_weights must be "balanced" or one positive number for each class, in the '
                f"order of the classes, such as 1,5; got {config.class_weights!r}"
            )
    if config.focal_gamma and config.head_refit:
        raise UserError(
            f"focal_gamma={config.focal_gamma:g} cannot be combined with head_refit, which "
            "replaces the classifiers by logistic regressions fitted with the cross-entropy: set "
            "--config.head_refit=False"
        )
    own = ":" in config.confidence  # imported where it is used
    policy = policy_rule(config.confidence) if config.confidence and not own else None
    categorical, several = (
        OBJECTIVES[objective].categorical,
        OBJECTIVES[objective].target_per_output,
    )
    if policy and policy.needs_probabilities and not categorical:
        raise UserError(
            f"confidence={config.confidence!r} is computed from probabilities, which "
            f"objective={objective} does not have: remove it"
        )
    if policy and not (policy.suits(OBJECTIVES[objective]) and (several or not policy.of_several)):
        raise UserError(
            f"confidence={config.confidence!r} does not apply to objective={objective}: remove it"
        )


def _check_layer_scaling(config: Keys) -> None:
    """Raises UserError if layer_scaling would change layers that must stay as they are."""
    if config.layer_scaling == 1:
        return
    if not config.head_refit:
        raise UserError(
            f"layer_scaling={config.layer_scaling:g} changes the layers after the heads were "
            "trained on them: also set --config.head_refit=True"
        )
    if config.grow_from:
        raise UserError(
            f"layer_scaling={config.layer_scaling:g} cannot be combined with grow_from, which "
            "keeps a run's layers unchanged: remove one of the two"
        )


def _as_numbers(text: str) -> tuple[float, ...]:
    """Returns comma-separated numbers; () if any of them is not a number."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return ()


def _check_isolation(config: Keys) -> None:
    method, factors = METHODS[config.method], config.boundary_isolation
    isolation = config.isolation or method.isolation
    if config.isolation_schedule != "linear" and len(isolation) != 2:
        raise UserError(
            f"isolation_schedule={config.isolation_schedule!r} needs a pair of numbers, such as "
            f"--config.isolation=0,1; isolation is {isolation!r}"
        )
    if method.model_per_exit:
        # A constant 0 is the method's own default.
        if factors or any(isolation):
            name = "boundary_isolation" if factors else "isolation"
            raise UserError(
                f"{name}={factors or isolation!r} does not apply to method={method.name}, whose "
                "models have no boundaries between exits: remove it, or set "
                "--config.method=early_exit"
            )
    elif factors and not any(isolation):
        raise UserError(
            f"boundary_isolation={factors!r} is multiplied by isolation, which is 0: also set "
            "--config.isolation=1"
        )
    elif factors and len(factors) != len(config.exits) - 1:
        raise UserError(
            f"boundary_isolation must be one number for each of the {len(config.exits) - 1} "
            f"boundaries between the exits {join_numbers(config.exits)}; got {factors!r}"
        )


def _check_loss_weights(config: Keys) -> None:
    """Raises UserError unless loss_weights is a number for each exit or the name of a schedule."""
    weights = config.loss_weights
    if METHODS[config.method].model_per_exit and weights not in ("", "uniform"):
        raise UserError(
            f"loss_weights={weights!r} does not apply to method={config.method}, each of whose "
            "models has one exit: remove it"
        )
    if isinstance(weights, str):
        if weights:
            LOSS_WEIGHTS[weights]  # raises UserError for an unknown name
    elif len(weights) != len(config.exits) or not all(0 < w < math.inf for w in weights):
        raise UserError(
            f"loss_weights must be one positive number for each of the {len(config.exits)} exits "
            f"{join_numbers(config.exits)}, or one of {', '.join(map(repr, LOSS_WEIGHTS))}; got "
            f"{weights!r}"
        )


def _check_last_exit(config: Keys) -> None:
    """Raises UserError for last_exit_first and the keys of distillation where they do not apply."""
    several = len(config.exits) > 1 and not METHODS[config.method].model_per_exit
    for key in ("last_exit_first", "distillation"):
        value = getattr(config, key)
        if value and not several:
            subject = "the model has" if len(config.exits) == 1 else f"a {config.method} model has"
            raise UserError(f"{key}={value:g} needs several exits, but {subject} one: remove it")
    for key, default in (("unlabeled_files", ""), ("distillation_temperature", 1.0)):
        value = getattr(config, key)
        if value != default and not config.distillation:
            raise UserError(
                f"{key}={value!r} applies only with distillation, which is off: also set "
                "--config.distillation=1"
            )
    if config.distillation_temperature != 1 and not OBJECTIVES[config.objective].categorical:
        raise UserError(
            f"distillation_temperature={config.distillation_temperature:g} applies to "
            f"probabilities, which objective={config.objective} does not have: remove it"
        )


def _check_conflict(config: Keys) -> None:
    """Raises UserError for conflict_every if no two exits train the same layer."""
    method = METHODS[config.method]
    isolation = config.isolation or method.isolation
    closed = min(*isolation, *config.boundary_isolation, 1.0) == 1
    single_exit = len(config.exits) == 1
    if config.conflict_every and (method.model_per_exit or closed or single_exit):
        setting = f"isolation={config.isolation!r}"
        if method.model_per_exit or (closed and not config.isolation):
            setting = f"method={config.method}"
        elif single_exit:
            setting = "one exit"
        raise UserError(
            f"conflict_every={config.conflict_every} compares the gradients of exits that train "
            f"the same layer, but with {setting} no two exits do: remove it, or use "
            "--config.method=early_exit with several exits and open boundaries"
        )


def _check_independent(config: Keys) -> None:
    """Raises UserError if exits that must be trained independently are coupled."""
    if not (config.segment_parallel or config.grow_from):
        return
    asked = "segment_parallel" if config.segment_parallel else "grow_from"
    for name, sound in (
        ("method", METHODS[config.method].trains_exits_independently),
        ("isolation", set(config.isolation) <= {1.0}),
        ("pooler", config.pooler in ("", "per_exit")),
        ("relative", config.relative in ("", "first")),
        ("clipping", config.clipping in ("", "owner")),
        ("boundary_isolation", set(config.boundary_isolation) <= {1.0}),
        ("last_exit_first", not config.last_exit_first),
        ("distillation", not config.distillation),
    ):
        if not sound:
            raise UserError(
                f"{asked} needs one model whose exits are trained independently, which "
                f"{name}={getattr(config, name)!r} rules out: remove one of the two"
            )


def _check_learning_to_exit(config: Keys) -> None:
    """Raises UserError for learning-to-exit if its heads are not trained with the classifiers.

    Such a head learns from its exit's classifier while that classifier is trained.
    """
    if config.learning_to_exit and (config.epochs == 0 or config.head_refit):
        name = "epochs" if config.epochs == 0 else "head_refit"
        raise UserError(
            f"learning_to_exit={config.learning_to_exit!r} cannot be combined with "
            f"{name}={getattr(config, name)!r}, because its heads would judge classifiers that "
            "they did not see in training: remove one of the two"
        )
