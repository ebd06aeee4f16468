"""The approximation error: measured where it is known, and its growth."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cts_fast.examples import approximation_error, error_runs
from cts_fast.examples.error_runs import Draw, Networks, errors, warmed_up


def no_progress():
    pass


@pytest.fixture
def draw():
    return Draw.new(0, draws=3, tasks=2, steps=12)


class Quadratic:
    """Gradients of ½ h ‖θ − c_t‖² in the place of networks."""

    def __init__(self, h, centres):
        self.h, self.centres = h, centres

    def gradients(self, theta, x, y):
        return self.h * (theta - self.centres)


def test_the_error_on_quadratics_is_the_closed_form(draw):
    h, alpha, beta, k = 0.7, 0.1, 0.2, 6
    centres = torch.randn(3, 2, draw.phi.shape[1], dtype=torch.float64)
    phi, theta, shifts = draw.phi, draw.phi[:, None].expand(-1, 2, -1), []
    for _ in range(k):
        theta = theta - alpha * h * (theta - centres)
        shifts.append(beta * (theta.mean(1) - phi))
        phi, theta = phi + shifts[-1], theta + shifts[-1][:, None]
    # U_n(a + Δ) − U_n(a) = (1 − αh)^n Δ: the shift Δ_j is exact but for the part (1 − αh)^j of it that the first j
    # steps would have left
    expected = sum(
        shift * ((1 - alpha * h) ** k - (1 - alpha * h) ** (k - j)) for j, shift in enumerate(shifts[:-1], 1)
    ).norm(dim=-1)
    measured = errors(Quadratic(h, centres), draw, [(alpha, beta)], (2, k), no_progress)[0, 1]
    torch.testing.assert_close(measured, expected, rtol=1e-8, atol=0)


def test_there_is_no_error_without_meta_updates_or_in_the_first_step(draw):
    networks = Networks("relu", "max")
    assert errors(networks, draw, [(0.05, 0.0)], (1, 5), no_progress).max() < 1e-13
    assert errors(networks, draw, [(0.05, 0.1)], (1,), no_progress).max() < 1e-13


def test_settings_measured_together_equal_settings_measured_alone(draw):
    networks = Networks("softplus", "average")
    together = errors(networks, draw, [(0.01, 0.1), (0.05, 0.2)], (3, 6), no_progress)
    alone = errors(networks, draw, [(0.05, 0.2)], (3, 6), no_progress)
    torch.testing.assert_close(together[1:], alone, rtol=1e-7, atol=0)


def test_a_network_is_the_module_that_its_description_says(draw):
    theta = draw.phi[:1]
    parts = [
        p.view(s)
        for p, s in zip(
            theta[0].split([torch.Size(s).numel() for s in error_runs.SHAPES]), error_runs.SHAPES, strict=True
        )
    ]
    conv = torch.nn.functional.conv2d
    images, labels = draw.batch(1)
    x = images[0, 0].view(-1, 1, 8, 8)
    for i, (weight, bias) in enumerate(zip(parts[:-2:2], parts[1:-2:2], strict=True)):
        x = conv(x, weight.view(weight.shape[0], -1, 3, 3), bias, padding=1).relu()
        x = torch.nn.functional.max_pool2d(x, 2) if i < 2 else x
    expected = torch.nn.functional.cross_entropy(x.flatten(1) @ parts[-2].T + parts[-1], labels[0, 0])
    torch.testing.assert_close(Networks("relu", "max").losses(theta, images[0, :1], labels[0, :1])[0], expected)


def test_the_error_grows_with_both_rates_and_the_length_and_with_kinks():
    draw = Draw.new(0, draws=4, tasks=2, steps=20)
    mean = {}
    for activation in ("softplus", "relu"):
        networks = Networks(activation, "average")
        found = errors(
            networks, warmed_up(networks, draw), [(0.02, 0.02), (0.08, 0.02), (0.02, 0.2)], (5, 20), no_progress
        ).mean(-1)
        (short, base), (_, fast), (_, large) = found.tolist()
        assert base > 2 * short and fast > 1.5 * base and large > 1.5 * base
        mean[activation] = base
    assert mean["relu"] > mean["softplus"]


def test_the_exponent_of_a_power_is_the_power():
    grid = (0.1, 0.5, 2.0)
    assert approximation_error.exponent(grid, 3 * torch.tensor(grid) ** 1.7) == pytest.approx(1.7, abs=1e-6)


def test_the_program_leaves_its_files_and_resumes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(approximation_error, "DRAWS", 2)
    monkeypatch.setattr(approximation_error, "K", 4)
    monkeypatch.setattr(approximation_error, "GRIDS", {"alpha": (0.01, 0.02), "beta": (0.01, 0.02), "k": (2, 4)})
    out = tmp_path / "run"
    assert approximation_error.main(["--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results["exponent"]) == {"alpha", "beta", "k"} and len(results["error"]["k"]["relu"][0]) == 2
    assert len(results["error_by_kind"]) == 4
    assert set(load_file(out / "initialization.safetensors")) == {
        "softplus-average",
        "relu-average",
        "softplus-max",
        "relu-max",
    }
    assert (out / "figure-3.png").stat().st_size > 10_000 and (out / "metrics.csv").read_text().count("\n") > 20
    printed = capsys.readouterr().out
    assert "the error grows with" in printed
    assert len({len(row) for row in printed[printed.index("network  ") :].splitlines()[:6]}) == 1, "not aligned"
    (out / "results.json").unlink()
    shutil.rmtree(out / "checkpoints" / "relu-max")
    assert approximation_error.main(["--out", str(out), "--resume"]) == 0
    assert json.loads((out / "results.json").read_text()) == results
