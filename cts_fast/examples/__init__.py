"""Programs: each is run as `python -m cts_fast.examples.NAME` and explains itself with `--help`."""
