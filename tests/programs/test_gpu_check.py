"""Facts about the GPU check that need no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import forms

PROGRAM = Path(gpu_check.__file__)


def test_of_a_section_that_was_stopped_the_last_whole_result_is_kept():
    output = 'RESULT {"rows": [1]}\nnoise\nRESULT {"rows": [1, 2]}\nRESULT {"rows": [1, 2, {"us'
    assert gpu_check.last_result(output) == {"rows": [1, 2]}
    assert gpu_check.last_result("noise") is None


def test_every_kernel_and_every_test_of_a_gpu_is_run():
    tests = gpu_check.ROOT / "tests"
    files = {file for run in gpu_check.pytest_runs("cuda").values() for file in run.files}
    assert all((tests / file).is_file() for file in files)
    assert {f"gpu/{path.name}" for path in (tests / "gpu").glob("test_*.py")} <= files
    assert files >= {
        "engine/test_step_in_halves.py",
        "experiments/test_continuation.py",
    }  # the kernels of ranks; resuming


@pytest.mark.parametrize("form", forms.FORMS)
def test_every_form_of_the_kernels_is_an_edit_of_what_the_sources_say(form):
    sources = forms.ROOT / "csrc" / "cuda"
    found = forms.edited(form)
    assert set(found) == {edit.file for edit in forms.FORMS[form]}
    assert all(text != (sources / file).read_text() for file, text in found.items())


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The program's dry run."""
    command = [sys.executable, str(PROGRAM), "--device", "cpu", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_dry_run_writes_its_results_as_json_and_as_a_table(tmp_path):
    out = run(tmp_path, "--only", "sanitizers", "bandwidth")
    assert out.returncode == 0, out.stdout + out.stderr
    (report,) = tmp_path.glob("cpu-*.json")
    sections = json.loads(report.read_text())["sections"]
    assert sections["bandwidth"]["bytes_per_second"] > 0 and set(sections) == {"sanitizers", "bandwidth"}
    assert "copy bandwidth" in report.with_suffix(".txt").read_text()


def test_a_section_without_time_says_so_and_the_run_fails(tmp_path):
    out = run(tmp_path, "--only", "bandwidth", "--seconds", "1")
    assert out.returncode == 1 and "no time was left" in out.stdout
    (report,) = tmp_path.glob("cpu-*.json")
    assert "no time" in json.loads(report.read_text())["sections"]["bandwidth"]["error"]
