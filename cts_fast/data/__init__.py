"""Image tasks to meta-train on and to hold out: ``load_suite("builtin")`` works offline, from the package itself."""

from cts_fast.data.archive import DamagedFile
from cts_fast.data.suite import ImageSet, Task, load_suite

__all__ = ["DamagedFile", "ImageSet", "Task", "load_suite"]
