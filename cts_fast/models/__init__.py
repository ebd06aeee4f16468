"""Networks of the image experiments: a shared `body` and a `head` of the task."""
