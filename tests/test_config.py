"""What a config may say, what it stands for, and how the command line reads into one."""

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
def parsed(tmp_path):
    """A function from a recipe's source and command line arguments to the Config."""

    def parsed(*arguments: str, source: str = "def get_config(): return {}", argument: str = ""):
        recipe = tmp_path / "recipe.py"
        recipe.write_text(source)
        line = ["main", f"--config={recipe}{argument}", f"--workdir={tmp_path / 'run'}"]
        config, workdir, *_ = parse([*line, *arguments])
        assert workdir == tmp_path / "run"
        return config

    return parsed


@pytest.mark.parametrize(
    ("values", "words"),
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
        ({"exits": "1,4"}, "exits must be whole numbers"),
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
            {"distillation_weight": 1.0, "method": "multi_model"},
            "distillation_weight=1 needs several exits, but a multi_model model has one: remove it",
        ),
        ({"distillation_weight": -1.0}, "distillation_weight must be 0 or more; got -1.0"),
        (
            {"distillation_weight": 1.0, "distillation_temperature": 0.0},
            "distillation_temperature must be positive and finite; got 0.0",
        ),
        (
            {"distillation_temperature": 2.0},
            "distillation_temperature=2.0 applies only with distillation, which is off: also set "
            "--config.distillation_weight=1",
        ),
        ({"unlabeled_files": "more.csv"}, "unlabeled_files='more.csv' applies only with distil"),
        (
            {
                "objective": "regression",
                "distillation_weight": 1.0,
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
def test_an_impossible_value_is_named_with_its_fix(values, words):
    with pytest.raises(UserError) as error:
        from_mapping(values)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_saved_config_is_read_as_it_was_written(tmp_path):
    config = Config(clip_norm=math.inf, task="inf", exits=(1, 3)).resolved()
    values = config_values(config, "digest")
    write_json(tmp_path / "config.json", values)
    with pytest.raises(UserError, match="is not finished: run its command again"):
        read_saved_config(tmp_path)
    write_json(tmp_path / "results.json", {})
    assert read_saved_config(tmp_path) == (config, "digest")
    write_json(tmp_path / "config.json", values | {"of_another_version": 1})
    assert read_saved_config(tmp_path, any_version=True) == (config, "digest")
    with pytest.raises(UserError, match="unknown config key 'of_another_version'"):
        read_saved_config(tmp_path)
    for damage in ("[]", "{", "{}"):
        (tmp_path / "config.json").write_text(damage)
        with pytest.raises(UserError, match=r"^the run is not the directory of a run "):
            read_saved_config(tmp_path, "the run")


def test_single_values_lists_and_whole_numbers_are_taken_for_what_they_mean():
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


@pytest.mark.parametrize("preset", PRESETS)
def test_resolved_fills_in_the_choices_of_the_preset(preset):
    config = Config(preset=preset).resolved()
    assert {key: getattr(config, key) for key in PRESETS[preset]} == PRESETS[preset]
    assert config.resolved() == config


def test_presets_say_where_temperatures_are_fitted():
    fitted = [Config(preset=preset).resolved().calibration for preset in ("", "paper", "reference")]
    assert fitted == ["held_out", "validation", "validation_dropout"]


def test_resolved_keeps_what_was_set_alone():
    config = Config(preset="reference", calibration="held_out", isolation=(0.5,)).resolved()
    assert (config.calibration, config.pooler, config.isolation) == ("held_out", "shared", (0.5,))


@pytest.mark.parametrize(
    ("method", "isolation"), [("sweet", (1.0,)), ("early_exit", (0.0,)), ("multi_model", (0.0,))]
)
def test_resolved_isolation_is_the_methods(method, isolation):
    assert Config(method=method).resolved().isolation == isolation
    if method != "multi_model":
        assert Config(method=method, isolation=(0.0, 1.0)).resolved().isolation == (0.0, 1.0)


def test_a_method_whose_isolation_is_a_pair_has_a_schedule_of_its_own(monkeypatch):
    gradual = dataclasses.replace(METHODS["sweet"], isolation=(0.0, 1.0))
    monkeypatch.setitem(METHODS, "sweet", gradual)
    assert Config(isolation_schedule="step").resolved().isolation == (0.0, 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_resolved_loss_weights_are_the_methods_unless_set(method):
    assert Config(method=method).resolved().loss_weights == METHODS[method].loss_weights
    values = {"method": method, "loss_weights": [1, 1, 2, 4]}
    if METHODS[method].model_per_exit:
        with pytest.raises(UserError, match="each of whose models has one exit"):
            from_mapping(values)
    else:
        assert from_mapping(values).resolved().loss_weights == (1.0, 1.0, 2.0, 4.0)


def test_schedules_of_loss_weights():
    """The weights of each exit at the first and at the last step."""
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


def test_a_recipe_s_numbers_give_way_to_a_name_of_the_command_line(parsed):
    source = "def get_config(): return {'loss_weights': (1, 2, 3, 4)}"
    assert parsed(source=source).loss_weights == (1.0, 2.0, 3.0, 4.0)
    assert parsed("--config.loss_weights=depth", source=source).loss_weights == "depth"


def test_what_goes_together_is_checked_after_the_command_line(parsed):
    """A recipe's values may fit the exits, or the method, that the command line names."""
    source = "def get_config(): return {'loss_weights': (1, 2, 4)}"
    assert parsed("--config.exits=1,2,3", source=source).loss_weights == (1.0, 2.0, 4.0)
    with pytest.raises(UserError, match="for each of the 4 exits 1,4,6,12"):
        parsed(source=source)
    source = "def get_config(): return {'exits': (2, 1), 'conflict_every': 5}"
    config = parsed("--config.method=early_exit", "--config.exits=1,2", source=source)
    assert (config.exits, config.conflict_every) == ((1, 2), 5)
    for value in ("()", "(1, 'x')", "None"):
        source = f"def get_config(): return {{'loss_weights': {value}}}"
        with pytest.raises(UserError, match="loss_weights must be one positive number for each"):
            parsed("--config.loss_weights=depth", source=source)


def test_conflict_is_measured_wherever_exits_share_layers():
    """Whatever the name of the method: SWEET with open boundaries too."""
    assert Config(isolation=(0.5,), conflict_every=5).conflict_every == 5


def test_replicas_are_every_seed_with_every_rate_seeds_outermost():
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
def test_the_command_line_sets_a_key(parsed, argument, key, value):
    config = parsed(f"--config.{argument}")
    assert config == from_mapping({key: value})
    kinds = [type(v) for v in value] if isinstance(value, tuple) else [type(value)]
    found = getattr(config, key)
    assert [type(v) for v in (found if isinstance(value, tuple) else (found,))] == kinds


def test_the_command_line_goes_over_the_recipe(parsed):
    source = "def get_config(): return {'epochs': 5, 'batch_size': 4}"
    config = parsed("--config.epochs=3", "--config.epochs=7", source=source)
    assert (config.epochs, config.batch_size) == (7, 4)


def test_of_a_key_of_several_values_too_the_last_counts(parsed):
    source = "def get_config(): return {'seeds': (4, 5)}"
    config = parsed("--config.seeds=0,1", "--config.epochs=3", "--config.seeds=2", source=source)
    assert (config.seeds, config.epochs) == ((2,), 3)


def test_what_follows_the_colon_is_the_recipes_argument(parsed):
    source = "def get_config(task='sst2'): return {'task': task}"
    assert parsed(source=source).task == "sst2"
    assert parsed(source=source, argument=":mrpc").task == "mrpc"


@pytest.mark.parametrize("argument", ["", ":mrpc"])
def test_the_path_of_a_config_file_may_contain_a_colon(argument, tmp_path):
    path = tmp_path / "a:b" / "own.py"
    path.parent.mkdir()
    path.write_text("def get_config(task='sst2'): return {'task': task}")
    config = parse(["main", f"--config={path}{argument}", f"--workdir={tmp_path / 'run'}"])[0]
    assert config.task == (argument[1:] or "sst2")


@pytest.mark.parametrize(
    ("recipe", "task"),
    [
        ("glue.py", "sst2"),
        ("glue.py:mrpc", "mrpc"),
        ("own.py", "own"),
        ("quickstart.py", "bbc_news"),
    ],
)
def test_the_shipped_recipes_are_valid(recipe, task, tmp_path):
    path = Path(__file__).parents[1] / "configs" / recipe
    assert parse(["main", f"--config={path}", f"--workdir={tmp_path}"])[0].task == task


@pytest.mark.parametrize(
    ("argument", "words"),
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
        ("--learning_rates=1", "unknown argument '--learning_rates=1'"),
        ("exits=1", "unknown argument 'exits=1'"),
    ],
)
def test_a_bad_argument_is_named(parsed, argument, words):
    with pytest.raises(UserError) as error:
        parsed(argument)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "words"),
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
def test_a_recipe_that_will_not_do_is_named_in_one_line(parsed, source, words):
    with pytest.raises(UserError) as error:
        parsed(source=source)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_argument_for_a_recipe_that_takes_none_is_an_error(parsed):
    with pytest.raises(UserError, match=r"recipe\.py': TypeError"):
        parsed(argument=":mrpc")


def test_a_misspelt_flag_is_named():
    with pytest.raises(UserError, match="unknown argument '--workdr=x': pass FILE, a file of "):
        parse(["main", "--config=configs/quickstart.py", "--workdr=x"])


@pytest.mark.parametrize("given", ["--config=configs/own.py", "--workdir=run", ""])
def test_config_and_workdir_must_both_be_given(given):
    with pytest.raises(UserError, match=r"pass FILE, .* or --config=FILE and --workdir=DIR"):
        parse(["main", *given.split()])


def test_an_absent_recipe_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config file '.*absent\.py' does not exist"):
        parse(["main", f"--config={tmp_path / 'absent.py'}", f"--workdir={tmp_path}"])
    with pytest.raises(UserError, match=r"config file '.*absent\.py' does not exist"):
        parse(["main", f"--config={tmp_path / 'absent.py'}"])


def test_a_method_s_own_isolation_may_be_scheduled(monkeypatch):
    opening = dataclasses.replace(METHODS["sweet"], name="opening", isolation=(1.0, 0.0))
    monkeypatch.setitem(METHODS, "opening", opening)
    config = from_mapping({"method": "opening", "isolation_schedule": "step"}).resolved()
    assert config.isolation == (1.0, 0.0)


def test_an_entry_of_a_table_is_all_that_a_name_needs(monkeypatch):
    """A method, an objective with its metric and policy, and a policy, from another package."""
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
