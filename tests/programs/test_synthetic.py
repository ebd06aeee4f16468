"""The synthetic experiment: its tasks, the numbers that it must show, and its files."""

import csv
import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from cts_fast.examples import synthetic
from cts_fast.examples.landscapes import ANGLES, Landscape, attractors, centres, template

SCORED = synthetic.square(torch.tensor(synthetic.START_AXIS, dtype=torch.float64))


def test_every_task_has_the_templates_minimum_beside_its_centre():
    torch.testing.assert_close(template(torch.tensor(3.0), torch.tensor(2.0)), torch.tensor(0.0))
    angles = torch.tensor(ANGLES, dtype=torch.float64)
    offset = 3 * torch.stack(
        (3 * angles.cos() + 2 * angles.sin(), 2 * angles.cos() - 3 * angles.sin()), -1
    )  # R(−angle)(3, 2), times 3
    assert Landscape().losses((centres() + offset)[:, None]).max() < 1e-20


def test_gradients_are_those_of_autograd():
    landscape, points = Landscape(), (10 * torch.randn(8, 5, 2, dtype=torch.float64)).requires_grad_()
    out = torch.empty_like(points)
    landscape.gradients_(points.detach(), out)
    torch.testing.assert_close(out, torch.autograd.grad(landscape.losses(points).sum(), points)[0])


def test_quality_is_the_loss_after_adam():
    theta = torch.tensor([2.0, 3.0], dtype=torch.float64).repeat(8, 1).requires_grad_()
    adam = torch.optim.Adam([theta], lr=0.1)
    for _ in range(100):
        adam.zero_grad()
        Landscape().losses(theta[:, None]).sum().backward()
        adam.step()
    expected = Landscape().losses(theta[:, None]).mean()
    torch.testing.assert_close(Landscape().quality(torch.tensor([[2.0, 3.0]]))[0], expected.detach())


def test_shifting_finds_a_good_initialization_from_all_nine_starts():
    found = synthetic.trajectories(Landscape(), "cts", SCORED, horizon=100, meta_updates=300)
    assert found["task_steps"] == 2400
    assert found["quality"][:8].mean().item() == pytest.approx(0.2645, abs=0.0005)
    assert found["quality"][8].item() == pytest.approx(0.05, abs=0.005)  # from (15, 15), where Reptile diverges


def test_reptile_with_five_steps_has_two_attractors():
    starts = synthetic.square(torch.linspace(-5, 15, 9, dtype=torch.float64))
    path = synthetic.trajectories(Landscape(), "reptile", starts, horizon=5, meta_updates=300)["path"]
    points = sorted(attractors(path, -5, 15).tolist())
    assert points == [pytest.approx([1.4, 11.5], abs=0.1), pytest.approx([9.1, -1.9], abs=0.1)]


def test_starts_do_not_disturb_each_other():
    alone = synthetic.trajectories(Landscape(), "cts", SCORED[:1], 20, 30)["path"]
    together = synthetic.trajectories(Landscape(), "cts", SCORED, 20, 30)["path"]
    torch.testing.assert_close(together[:, :1], alone, rtol=1e-9, atol=1e-9)


def test_attractors_are_where_trajectories_rest():
    path = torch.zeros(21, 4, 2)
    path[:, 0], path[:, 1], path[:, 2] = 1.0, 1.1, 40.0  # two at one place, one outside the square
    path[:, 3, 0] = torch.arange(21)  # one on its way
    assert attractors(path, 0, 20).tolist() == [pytest.approx([1.0, 1.0], abs=0.11)]


@pytest.fixture
def small(monkeypatch):
    """The program at a hundredth of its size."""
    for name, value in {"HORIZON": 6, "ROUNDS": 2, "REPTILE_HORIZONS": (5, 6), "MAP_SIDE": 15, "GRID_SIDE": 3}.items():
        monkeypatch.setattr(synthetic, name, value)


def test_the_program_leaves_its_files_and_resumes(small, tmp_path, capsys):
    out = tmp_path / "run"
    assert synthetic.main(["--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results["final_loss"]) == {"reptile", "cts", "cts-accurate"}
    assert results["task_steps"] == {"reptile": 12 * 6 * 8, "cts": 12 * 8, "cts-accurate": 2 * 21 * 8}
    assert load_file(out / "initialization.safetensors")["cts"].shape == (9, 2)
    assert {row["method"] for row in csv.DictReader((out / "metrics.csv").open())} == {"reptile", "cts", "cts-accurate"}
    assert all((out / f"figure-{n}.png").stat().st_size > 10_000 for n in (4, 5))
    assert "final loss" in capsys.readouterr().out

    (out / "results.json").unlink()
    shutil.rmtree(out / "checkpoints" / "cts")
    with pytest.raises(SystemExit):
        synthetic.main(["--out", str(out)])
    assert "add --resume" in capsys.readouterr().err
    assert synthetic.main(["--out", str(out), "--resume"]) == 0
    assert json.loads((out / "results.json").read_text()) == results

    with pytest.raises(SystemExit):
        synthetic.main(["--out", str(out), "--resume", "--seed", "7"])
    assert "seed was 0, now 7" in capsys.readouterr().err


def test_sigterm_ends_a_study_as_ctrl_c_does(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(synthetic, "trajectories", lambda *arguments: signal.raise_signal(signal.SIGTERM))
    assert synthetic.main(["--out", str(tmp_path / "run")]) == 128 + signal.SIGTERM
    assert "--resume" in capsys.readouterr().err and not (tmp_path / "run" / "finished.json").exists()
    assert (tmp_path / "run" / "checkpoints" / "quality").exists()


def test_an_interrupted_run_says_how_to_go_on_and_does(small, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)

    out, trajectories = tmp_path / "run", synthetic.trajectories
    monkeypatch.setattr(synthetic, "trajectories", interrupted)
    assert synthetic.main(["--out", str(out)]) == 130
    assert f"cts_fast.examples.synthetic --out {out} --resume" in capsys.readouterr().err
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["quality"]
    monkeypatch.setattr(synthetic, "trajectories", trajectories)
    monkeypatch.setattr(synthetic, "quality_map", interrupted)  # what is there is not computed again
    assert synthetic.main(["--out", str(out), "--resume"]) == 0


@pytest.mark.slow
def test_the_whole_program_shows_the_papers_order_of_methods(tmp_path):
    assert synthetic.main(["--out", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["final_loss"] == pytest.approx({"reptile": 0.79, "cts": 0.26, "cts-accurate": 0.44}, abs=0.01)
    assert results["task_steps"] == {"reptile": 240_000, "cts": 2_400, "cts-accurate": 121_200}
    assert [len(results["attractors"][k]) for k in ("5", "10")] == [2, 8] and len(results["attractors"]["100"]) >= 10
    assert results["short_horizon_bias"]["loss_after_100"][-1] == min(results["short_horizon_bias"]["loss_after_100"])
