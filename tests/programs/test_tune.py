"""`python -m cts_fast.examples.tune`: step sizes are compared on the meta-training tasks alone."""

import json

import pytest

from cts_fast.examples import tune
from cts_fast.experiments.training import Curve


def test_tuning_never_touches_held_out_tasks(tmp_path, capsys):
    small = ["--suite", "tiny", "--horizon", "2", "--rounds", "1", "--test-steps", "2"]
    small += ["--model", "support.nets:SmallNet"]
    assert tune.main([*small, "--grid", "cts=0.1", "--grid", "reptile=0.5,1", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "fold1" / "config.json").read_text())["model"] == "support.nets:SmallNet"
    results = json.loads((tmp_path / "tune.json").read_text())
    config = results["config"]
    assert config == json.loads((tmp_path / "config.json").read_text())
    assert (config["suite"], config["preset"], config["tasks"]) == ("tiny", "quick", ["stripes", "dots", "waves"])
    assert (config["meta_train"]["horizon"], config["meta_test"]["steps"]) == (2, 2)
    assert set(results["mean"]) == {"cts@0.1", "reptile@0.5", "reptile@1", "scratch"}
    assert all(set(by_task) == {"stripes", "dots", "waves"} for by_task in results["accuracy"].values())
    assert "mean accuracy on 3 validation tasks" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--device", "nonsense"], ["--device nonsense cannot be used"]),
        (["--grid", "fomaml=0.1", "--held-back", "0"], ["fomaml@0.1 needs", "dots holds none back", "--held-back F"]),
    ],
)
def test_tuning_that_cannot_run_is_refused_before_there_is_a_folder(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--suite", "tiny", *arguments, "--grid", "cts=0.1", "--out", str(tmp_path / "out")])
    message = capsys.readouterr().err
    assert all(word in message for word in words) and not (tmp_path / "out").exists()


def test_tuning_takes_some_of_the_tasks_at_a_size(tmp_path):
    small = ["--suite", "tiny", "--horizon", "2", "--rounds", "1", "--test-steps", "2", "--grid", "cts=0.1"]
    small += ["--model", "support.nets:SmallNet", "--tasks", "waves,stripes", "--size", "8"]
    assert tune.main([*small, "--out", str(tmp_path)]) == 0
    config = json.loads((tmp_path / "fold0" / "config.json").read_text())
    assert config["meta_train"]["size"] == config["meta_test"]["size"] == 8
    accuracy = json.loads((tmp_path / "tune.json").read_text())["accuracy"]
    assert all(list(by_task) == ["waves", "stripes"] for by_task in accuracy.values())


@pytest.mark.parametrize("each", [1, 2, 4])
def test_the_loss_of_the_last_steps_is_of_as_many_whatever_a_point_of_the_curve_stands_for(each):
    """The loss of step n is n; each point is the mean of as many steps, as in a long run."""
    points = [range(first, first + each) for first in range(1, 101, each)]
    curve = Curve(("a",), ("a",), [point[-1] for point in points], [[sum(point) / each] for point in points])
    assert tune.last_loss(curve) == pytest.approx(90.5)
