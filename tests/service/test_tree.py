import pytest

from control.config import RunConfig
from control.reference import reference
from control.train import run as run_training
from spheres.task import load_task


@pytest.mark.timeout(120)
def test_a_tree_of_processes_gives_the_reference_loops_bits(run, tmp_path):
    config = RunConfig(task="digits", steps=20, spheres=3, fan_out=1, run_dir=tmp_path / "run")
    summary = run(run_training(config), timeout=100)
    assert summary.error is None
    assert summary.weights_sha256 == reference(load_task("digits"), config).weights_sha256
