"""Builds the suite that comes with the package; using it needs none of this."""
