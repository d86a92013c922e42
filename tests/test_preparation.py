"""What is prepared is read once: a run needs the files of its config no more."""

import jax
import numpy as np
from tiny import write_checkpoint, write_rows

from sweet_jax.config import from_mapping
from sweet_jax.models.pretrained import open_checkpoint
from sweet_jax.preparation import prepare
from sweet_jax.training.initialization import initial_state, model_specs


def test_models_start_from_the_weights_that_were_prepared(options, tmp_path):
    folder, path = write_checkpoint(tmp_path / "tiny"), write_rows(tmp_path / "rows.csv", 60)
    values = options | {"checkpoint": str(folder), "data_files": str(path), "train_size": 40}
    job = prepare(from_mapping(values | {"method": "multi_model"}))
    assert job.digest == job.dataset.digest()
    wanted = open_checkpoint(str(folder)).weights.encoder
    (folder / "model.safetensors").unlink()
    path.unlink()
    specs = model_specs(job.config)
    assert [spec.exits for spec in specs] == [(1,), (2,), (3,)]
    for spec in specs:
        _, state = initial_state(job.config, job.checkpoint, spec, len(job.dataset.classes))
        found = jax.tree.map(lambda x: x[0], state.params["encoder"])
        depth = spec.exits[-1]
        assert list(found["layers"]) == list(range(depth))
        expected = {**wanted, "layers": {i: wanted["layers"][i] for i in range(depth)}}
        jax.tree.map(np.testing.assert_array_equal, found, expected)
