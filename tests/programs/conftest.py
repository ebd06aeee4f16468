"""The suite "tiny", which the programs run on here. They draw no figures, which take half of a small run's time, but
where a test asks for them: each form of them is drawn in some test."""

import pytest
from support.image_tasks import make_suite

from cts_fast.data import suite
from cts_fast.experiments import report

DRAWINGS = report.drawings


@pytest.fixture(autouse=True)
def tiny_suite(monkeypatch):
    monkeypatch.setitem(suite.SUITES, "tiny", make_suite)


@pytest.fixture(scope="module", autouse=True)
def no_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "drawings", lambda *given: [])
        yield


@pytest.fixture
def figures(monkeypatch):
    """The runs of this test draw their figures."""
    monkeypatch.setattr(report, "drawings", DRAWINGS)
