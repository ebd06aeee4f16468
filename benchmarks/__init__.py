"""The step's benchmarks: `pytest benchmarks/` for a look, `python -m benchmarks.report` for tables and figures."""
