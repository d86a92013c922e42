"""Validation and defaults of a Config, and how config files and arguments become one."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from sweet_jax.config import Config, describe_keys, from_mapping
from sweet_jax.config.presets import PRESETS
from sweet_jax.errors import UserError
from sweet_jax.exits.confidences import POLICIES
from sweet_jax.files import write_json
from sweet_jax.main import parse
from sweet_jax.methods import METHODS, loss_weights
from sweet_jax.objectives import OBJECTIVES
from sweet_jax.saved_config import config_values, read_saved_config


@pytest.fixture
def parse_config(tmp_path):
    """Returns a function of arguments and of a config file's source that returns the Config."""

    def parse_config(
        *arguments: str, source: str = "def get_config(): return {}", argument: str = ""
    ):
        config_file = tmp_path / "recipe.py"
        config_file.write_text(source)
        line = ["main", f"--config={config_file}{argument}", f"--workdir={tmp_path / 'run'}"]
        config, workdir, *_ = parse([*line, *arguments])
        assert workdir == tmp_path / "run"
        return config

    return parse_config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exit": (1, 12)}, "unknown config key 'exit': did you mean 'exits'?"),
        ({"learning_rate": 1e-4}, "did you mean 'learning_rates'?"),
        ({"method": "swet"}, "unknown method 'swet': did you mean 'sweet'?"),
        ({"preset": "papre"}, "unknown preset 'papre': did you mean 'paper'?"),
        ({"dtype": "float61"}, "unknown dtype 'float61': did you mean"),
        ({"metric": "zzz"}, "unknown metric 'zzz': choose one of"),
        ({"exits": ()}, "exits must be at least one layer number; got ()"),
        ({"exits": (0, 12)}, "exits must be layer numbers from 1; got (0, 12)"),
        ({"exits": (-1, 12)}, "exits must be layer numbers from 1"),
        ({"exits": (4, 1, 12)}, "exits must be ascending without repeats; got (4, 1, 12)"),
        ({"exits": (1, 4, 4)}, "exits must be ascending without repeats"),
        ({"exits": (1.5, 12)}, "exits must be whole numbers separated by commas"),
        ({"exits": (True, 12)}, "exits must be whole numbers"),
        ({"exits": "1,four"}, "exits must be whole numbers"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"seeds": ()}, "seeds must be at least one number"),
        ({"seeds": (1, 1)}, "seeds must be distinct; got (1, 1)"),
        ({"seeds": (-1,)}, "seeds must be from 0"),
        ({"seeds": (2**31,)}, "seeds must be from 0"),
        ({"learning_rates": ()}, "learning_rates must be at least one number"),
        ({"learning_rates": (0.0,)}, "learning_rates must be positive and finite; got (0.0,)"),
        ({"learning_rates": (-1e-4,)}, "learning_rates must be positive and finite"),
        ({"learning_rates": (float("inf"),)}, "learning_rates must be positive and finite"),
        ({"learning_rates": (float("nan"),)}, "learning_rates must be positive and finite"),
        ({"learning_rates": (1e-4, 1e-4)}, "learning_rates must be distinct"),
        ({"learning_rates": ("1e-4",)}, "learning_rates must be numbers"),
        ({"isolation": (1.5,)}, "isolation must be from 0 to 1; got (1.5,)"),
        ({"isolation": (0.0, -0.1)}, "isolation must be from 0 to 1"),
        ({"isolation": (float("nan"),)}, "isolation must be from 0 to 1"),
        ({"isolation": (0.0, 0.5, 1.0)}, "isolation must be one number, or a pair from, to"),
        ({"boundary_isolation": (0.5, 1.5, 1.0)}, "boundary_isolation must be from 0 to 1"),
        (
            {"boundary_isolation": (1.0, 0.5)},
            "one number for each of the 3 boundaries between the exits 1,4,6,12; got (1.0, 0.5)",
        ),
        ({"boundary_isolation": (1,)}, "boundary_isolation must be one number for each of the 3"),
        (
            {"method": "multi_model", "boundary_isolation": (1.0, 1.0, 1.0)},
            "boundary_isolation=(1.0, 1.0, 1.0) does not apply to method=multi_model, whose models "
            "have no boundaries between exits",
        ),
        (
            {"method": "early_exit", "boundary_isolation": (1.0, 0.5, 0.0)},
            "is multiplied by isolation, which is 0: also set --config.isolation=1",
        ),
        (
            {"method": "multi_model", "isolation": 1},
            "isolation=(1.0,) does not apply to method=multi_model",
        ),
        ({"loss_weights": "dept"}, "unknown loss_weights 'dept': did you mean 'depth'?"),
        (
            {"loss_weights": (1.0, 2.0)},
            "loss_weights must be one positive number for each of the 4 exits 1,4,6,12, or one of "
            "'uniform', 'depth', 'shallow_deep'; got (1.0, 2.0)",
        ),
        ({"loss_weights": (1, 1, 1, 0)}, "got (1.0, 1.0, 1.0, 0.0)"),
        ({"loss_weights": (1, 1, 1, float("inf"))}, "loss_weights must be one positive number"),
        ({"loss_weights": (1, 1, 1, "x")}, "loss_weights must be one positive number"),
        ({"loss_weights": "1,2,3,x"}, "unknown loss_weights '1,2,3,x'"),
        ({"layer_scaling": 1.5}, "layer_scaling must be from 0 to 1; got 1.5"),
        (
            {"layer_scaling": 0.5},
            "layer_scaling=0.5 changes the layers after the heads were trained on them: also set "
            "--config.head_refit=True",
        ),
        (
            {"layer_scaling": 0.5, "head_refit": True, "grow_from": "run"},
            "layer_scaling=0.5 cannot be combined with grow_from, which keeps a run's layers unch",
        ),
        ({"last_exit_first": 1.0}, "last_exit_first must be at least 0 and less than 1; got 1.0"),
        (
            {"last_exit_first": 0.5, "exits": (12,)},
            "last_exit_first=0.5 needs several exits, but the model has one: remove it",
        ),
        (
            {"distillation": 1.0, "method": "multi_model"},
            "distillation=1 needs several exits, but a multi_model model has one: remove it",
        ),
        ({"distillation": -1.0}, "distillation must be 0 or more; got -1.0"),
        (
            {"distillation": 1.0, "distillation_temperature": 0.0},
            "distillation_temperature must be positive and finite; got 0.0",
        ),
        (
            {"distillation_temperature": 2.0},
            "distillation_temperature=2.0 applies only with distillation, which is off: also set "
            "--config.distillation=1",
        ),
        ({"unlabeled_files": "more.csv"}, "unlabeled_files='more.csv' applies only with distil"),
        (
            {
                "objective": "regression",
                "distillation": 1.0,
                "distillation_temperature": 2.0,
            },
            "distillation_temperature=2 applies to probabilities, which objective=regression does ",
        ),
        ({"isolation_schedule": "stop"}, "unknown isolation_schedule 'stop': did you mean 'step'?"),
        ({"isolation_schedule": "step"}, "needs a pair of numbers, such as --config.isolation=0,1"),
        ({"isolation_schedule": "step", "method": "sweet"}, "isolation is (1.0,)"),
        ({"isolation_schedule": "step", "isolation": 0.5}, "isolation is (0.5,)"),
        ({"conflict_every": -1}, "conflict_every must be 0 or more"),
        ({"max_steps": -1}, "max_steps must be 0 or more"),
        ({"conflict_every": 5}, "train the same layer, but with method=sweet no two exits do"),
        ({"conflict_every": 5, "method": "multi_model"}, "but with method=multi_model no two"),
        (
            {"conflict_every": 5, "method": "early_exit", "isolation": 1},
            "but with isolation=(1.0,) no two",
        ),
        ({"conflict_every": 5, "method": "early_exit", "exits": 12}, "but with one exit no two"),
        ({"learning_to_exit": "jiont"}, "unknown learning_to_exit 'jiont': did you mean 'joint'?"),
        ({"train_size": 0}, "train_size must be 1 or more; got 0"),
        ({"train_size": 10.0}, "train_size must be a whole number (int); got 10.0"),
        ({"train_size": True}, "train_size must be a whole number (int)"),
        ({"epochs": "two"}, "epochs must be a whole number or \"auto\"; got 'two'"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"checkpoint_every": 0}, "checkpoint_every must be 1 or more"),
        ({"max_length": 7}, "max_length must be 8 tokens or more"),
        ({"calibration_fraction": 1.0}, "calibration_fraction must be between 0 and 1"),
        ({"validation_fraction": 0.0}, "validation_fraction must be between 0 and 1"),
        ({"warmup_fraction": 1.0}, "warmup_fraction must be at least 0 and less than 1"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"task": ""}, "task must be a name"),
        ({"task": 3}, "task must be text (str); got 3"),
        ({"label_column": ""}, "label_column must be a column name"),
    ],
)
def test_invalid_config_value_error_names_value_and_fix(values, message):
    with pytest.raises(UserError) as error:
        from_mapping(values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_saved_config_round_trips_and_refuses_unfinished_or_damaged_runs(tmp_path):
    config = Config(clip_norm=math.inf, task="inf", exits=(1, 3)).resolved()
    values = config_values(config, "digest")
    write_json(tmp_path / "config.json", values)
    with pytest.raises(UserError, match="is not finished: run its command again"):
        read_saved_config(tmp_path)
    write_json(tmp_path / "results.json", {})
    assert read_saved_config(tmp_path) == (config, "digest")
    earlier = dict(values)
    earlier["distillation_weight"] = earlier.pop("distillation")
    write_json(tmp_path / "config.json", earlier)
    assert read_saved_config(tmp_path) == (config, "digest")
    write_json(tmp_path / "config.json", values | {"of_another_version": 1})
    assert read_saved_config(tmp_path, any_version=True) == (config, "digest")
    with pytest.raises(UserError, match="unknown config key 'of_another_version'"):
        read_saved_config(tmp_path)
    for damage in ("[]", "{", "{}"):
        (tmp_path / "config.json").write_text(damage)
        with pytest.raises(UserError, match=r"^the run is not the directory of a run "):
            read_saved_config(tmp_path, "the run")


def test_from_mapping_converts_scalars_lists_and_integers():
    config = from_mapping(
        {
            "exits": [1, 2],
            "seeds": 3,
            "learning_rates": 1e-3,
            "isolation": [0, 1],
            "clip_norm": 2,
            "text_columns": ("question", "answer"),
        }
    )
    assert (config.exits, config.seeds, config.learning_rates) == ((1, 2), (3,), (1e-3,))
    assert config.isolation == (0.0, 1.0)
    assert all(type(a) is float for a in (*config.isolation, config.clip_norm))
    assert config.text_columns == "question,answer"
    texts = from_mapping({"exits": "1, 2", "seeds": "3", "isolation": "0,1"})
    assert (texts.exits, texts.seeds, texts.isolation) == ((1, 2), (3,), (0.0, 1.0))


@pytest.mark.parametrize("preset", PRESETS)
def test_resolved_config_takes_values_of_preset(preset):
    config = Config(preset=preset).resolved()
    assert {key: getattr(config, key) for key in PRESETS[preset]} == PRESETS[preset]
    assert config.resolved() == config


def test_each_preset_sets_its_calibration_split():
    calibrations = [
        Config(preset=preset).resolved().calibration for preset in ("", "paper", "reference")
    ]
    assert calibrations == ["held_out", "validation", "validation_dropout"]


def test_explicit_values_override_preset():
    config = Config(preset="reference", calibration="held_out", isolation=(0.5,)).resolved()
    assert (config.calibration, config.pooler, config.isolation) == ("held_out", "shared", (0.5,))


@pytest.mark.parametrize(
    ("method", "isolation"), [("sweet", (1.0,)), ("early_exit", (0.0,)), ("multi_model", (0.0,))]
)
def test_resolved_isolation_defaults_to_that_of_method(method, isolation):
    assert Config(method=method).resolved().isolation == isolation
    if method != "multi_model":
        assert Config(method=method, isolation=(0.0, 1.0)).resolved().isolation == (0.0, 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_resolved_loss_weights_default_to_those_of_method(method):
    assert Config(method=method).resolved().loss_weights == METHODS[method].loss_weights
    values = {"method": method, "loss_weights": [1, 1, 2, 4]}
    if METHODS[method].model_per_exit:
        with pytest.raises(UserError, match="each of whose models has one exit"):
            from_mapping(values)
    else:
        assert from_mapping(values).resolved().loss_weights == (1.0, 1.0, 2.0, 4.0)


def test_loss_weights_have_expected_first_and_last_values():
    exits = (1, 4, 6, 12)
    assert loss_weights("uniform", exits) == ((1.0, 1.0),) * 4
    start, end = np.transpose(loss_weights("depth", exits))
    np.testing.assert_allclose(end / end[0], exits)
    assert end.sum() == pytest.approx(4)
    np.testing.assert_array_equal(start, end)
    start, end = np.transpose(loss_weights("shallow_deep", exits))
    np.testing.assert_allclose(start, [0.01, 0.01, 0.01, 1])
    np.testing.assert_allclose(end, [1 / 12, 1 / 3, 1 / 2, 1])
    assert loss_weights((2.0, 3.0), (1, 2)) == ((2.0, 2.0), (3.0, 3.0))


def test_command_line_name_overrides_loss_weight_numbers_of_config_file(parse_config):
    source = "def get_config(): return {'loss_weights': (1, 2, 3, 4)}"
    assert parse_config(source=source).loss_weights == (1.0, 2.0, 3.0, 4.0)
    assert parse_config("--config.loss_weights=depth", source=source).loss_weights == "depth"


def test_combinations_are_validated_after_command_line_overrides(parse_config):
    """Values of a config file may require exits or a method that only the command line sets."""
    source = "def get_config(): return {'loss_weights': (1, 2, 4)}"
    assert parse_config("--config.exits=1,2,3", source=source).loss_weights == (1.0, 2.0, 4.0)
    with pytest.raises(UserError, match="for each of the 4 exits 1,4,6,12"):
        parse_config(source=source)
    source = "def get_config(): return {'exits': (2, 1), 'conflict_every': 5}"
    config = parse_config("--config.method=early_exit", "--config.exits=1,2", source=source)
    assert (config.exits, config.conflict_every) == ((1, 2), 5)
    for value in ("()", "(1, 'x')", "None"):
        source = f"def get_config(): return {{'loss_weights': {value}}}"
        with pytest.raises(UserError, match="loss_weights must be one positive number for each"):
            parse_config("--config.loss_weights=depth", source=source)


def test_conflict_every_is_accepted_for_sweet_with_partial_isolation():
    assert Config(isolation=(0.5,), conflict_every=5).conflict_every == 5


def test_replicas_are_product_of_seeds_and_rates_with_seeds_outermost():
    config = Config(seeds=(0, 7), learning_rates=(1e-4, 3e-4))
    assert config.replicas() == ((0, 1e-4), (0, 3e-4), (7, 1e-4), (7, 3e-4))


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("exits=1,2,3", "exits", (1, 2, 3)),
        ("exits=(1,2,3)", "exits", (1, 2, 3)),
        ("exits=3", "exits", (3,)),
        ("learning_rates=3e-4", "learning_rates", (3e-4,)),
        ("learning_rates=3e-5,5e-5", "learning_rates", (3e-5, 5e-5)),
        ("learning_rates=1", "learning_rates", (1.0,)),
        ("seeds=0,1", "seeds", (0, 1)),
        ("seeds=4", "seeds", (4,)),
        ("isolation=0,1", "isolation", (0.0, 1.0)),
        ("isolation=0.5", "isolation", (0.5,)),
        ("boundary_isolation=1,0.5,0", "boundary_isolation", (1.0, 0.5, 0.0)),
        ("text_columns=a,b", "text_columns", "a,b"),
        ("data_files=a.csv,b.csv", "data_files", "a.csv,b.csv"),
        ("label_column=1", "label_column", "1"),
        ("epochs=3", "epochs", 3),
        ("loss_weights=depth", "loss_weights", "depth"),
        ("loss_weights=1,2,3,4.5", "loss_weights", (1.0, 2.0, 3.0, 4.5)),
        ("clip_norm=inf", "clip_norm", float("inf")),
    ],
)
def test_command_line_value_is_converted_to_type_of_key(parse_config, argument, key, value):
    config = parse_config(f"--config.{argument}")
    assert config == from_mapping({key: value})
    actual = getattr(config, key)
    assert type(actual) is type(value)
    if isinstance(value, tuple):
        assert [type(v) for v in actual] == [type(v) for v in value]


def test_last_command_line_value_overrides_config_file(parse_config):
    source = "def get_config(): return {'epochs': 5, 'batch_size': 4}"
    config = parse_config("--config.epochs=3", "--config.epochs=7", source=source)
    assert (config.epochs, config.batch_size) == (7, 4)


def test_last_command_line_value_replaces_whole_tuple(parse_config):
    source = "def get_config(): return {'seeds': (4, 5)}"
    config = parse_config(
        "--config.seeds=0,1", "--config.epochs=3", "--config.seeds=2", source=source
    )
    assert (config.seeds, config.epochs) == ((2,), 3)


def test_text_after_colon_is_argument_of_get_config(parse_config):
    source = "def get_config(task='sst2'): return {'task': task}"
    assert parse_config(source=source).task == "sst2"
    assert parse_config(source=source, argument=":mrpc").task == "mrpc"


@pytest.mark.parametrize("argument", ["", ":mrpc"])
def test_config_file_path_may_contain_a_colon(argument, tmp_path):
    path = tmp_path / "a:b" / "own.py"
    path.parent.mkdir()
    path.write_text("def get_config(task='sst2'): return {'task': task}")
    config = parse(["main", f"--config={path}{argument}", f"--workdir={tmp_path / 'run'}"])[0]
    assert config.task == (argument[1:] or "sst2")


@pytest.mark.parametrize(
    ("file_name", "task"),
    [
        ("glue.py", "sst2"),
        ("glue.py:mrpc", "mrpc"),
        ("own.py", "own"),
        ("quickstart.py", "bbc_news"),
    ],
)
def test_shipped_config_files_are_valid(file_name, task, tmp_path):
    path = Path(__file__).parents[1] / "configs" / file_name
    assert parse(["main", f"--config={path}", f"--workdir={tmp_path}"])[0].task == task


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.exitz=1", "unknown config key 'exitz': did you mean 'exits'?"),
        ("--config.exits[0]=1", "unknown config key 'exits[0]': did you mean 'exits'?"),
        ("--config.exits=1,x", "exits must be whole numbers"),
        ("--config.exits=1,2.5", "exits must be whole numbers"),
        ("--config.exits=", "exits must be whole numbers"),
        ("--config.exits=2,1", "exits must be ascending"),
        ("--config.epochs=two", "epochs must be a whole number or \"auto\"; got 'two'"),
        ("--config.train_size=1e3", "train_size must be a whole number (int); got '1e3'"),
        ("--config.clip_norm=x", "clip_norm must be a number (float); got 'x'"),
        ("--config.skip_invalid=maybe", "skip_invalid must be True or False; got 'maybe'"),
        ("--config.task", "--config.task"),
        ("--config.isolation=2", "isolation must be from 0 to 1"),
        (
            "--learning_rates=1",
            "unknown argument '--learning_rates=1': did you mean '--config.learning_rates'?",
        ),
        ("exits=1", "unknown argument 'exits=1': did you mean '--config.exits'?"),
        ("--zzz=1", "unknown argument '--zzz=1': write --config.KEY=VALUE"),
    ],
)
def test_invalid_command_line_argument_is_named_in_one_line(parse_config, argument, message):
    with pytest.raises(UserError) as error:
        parse_config(argument)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_config(): return {'exit': (1, 2)}", "did you mean 'exits'?"),
        ("def get_config(): raise ValueError('no luck')", "recipe.py': ValueError: no luck"),
        ("def get_config(): raise ValueError('no\\nluck')", "ValueError: no luck"),
        ("import absent_module", "recipe.py': ModuleNotFoundError"),
        ("def get_config(:", "recipe.py': SyntaxError"),
        ("x = 1", "recipe.py': KeyError: 'get_config'"),
        ("def get_config(): pass", "recipe.py'"),
        ("def get_config(): return 3", "recipe.py'"),
    ],
)
def test_invalid_config_file_is_named_in_one_line(parse_config, source, message):
    with pytest.raises(UserError) as error:
        parse_config(source=source)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_argument_for_get_config_without_parameters_is_refused(parse_config):
    with pytest.raises(UserError, match=r"recipe\.py': TypeError"):
        parse_config(argument=":mrpc")


def test_misspelt_flag_is_refused():
    with pytest.raises(UserError, match="unknown argument '--workdr=x': did you mean '--workdir'"):
        parse(["main", "--config=configs/quickstart.py", "--workdr=x"])
    with pytest.raises(UserError, match="unknown argument '--zzz=x': pass FILE, a file of "):
        parse(["main", "--config=configs/quickstart.py", "--zzz=x"])


@pytest.mark.parametrize("arguments", ["--config=configs/own.py", "--workdir=run", ""])
def test_config_and_workdir_are_required_together(arguments):
    with pytest.raises(UserError, match=r"pass FILE, .* or --config=FILE and --workdir=DIR"):
        parse(["main", *arguments.split()])


def test_missing_config_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config file '.*absent\.py' does not exist"):
        parse(["main", f"--config={tmp_path / 'absent.py'}", f"--workdir={tmp_path}"])
    with pytest.raises(UserError, match=r"config file '.*absent\.py' does not exist"):
        parse(["main", f"--config={tmp_path / 'absent.py'}"])


def test_isolation_schedule_applies_to_isolation_pair_of_method(monkeypatch):
    scheduled = dataclasses.replace(METHODS["sweet"], name="scheduled", isolation=(1.0, 0.0))
    monkeypatch.setitem(METHODS, "scheduled", scheduled)
    config = from_mapping({"method": "scheduled", "isolation_schedule": "step"}).resolved()
    assert config.isolation == (1.0, 0.0)


def test_registered_method_objective_metric_and_policy_are_accepted(monkeypatch):
    """Another package adds them to the tables; config keys and their reference then have them."""
    score = dataclasses.replace(OBJECTIVES["single_label"].metrics[0], name="own_score")
    monkeypatch.setitem(METHODS, "own", dataclasses.replace(METHODS["sweet"], name="own"))
    monkeypatch.setitem(
        OBJECTIVES,
        "ordinal",
        dataclasses.replace(
            OBJECTIVES["single_label"], name="ordinal", metrics=(score,), default_policy="own"
        ),
    )
    monkeypatch.setitem(POLICIES, "own", POLICIES["margin"])
    config = from_mapping({"method": "own", "objective": "ordinal", "metric": "own_score"})
    assert config.resolved().confidence == "own"
    allowed = {key.name: key.allowed for key in describe_keys()}
    for key, name in (
        ("method", "own"),
        ("objective", "ordinal"),
        ("metric", "own_score"),
        ("confidence", "own"),
    ):
        assert name in allowed[key].split(", ")
