"""Image tasks to meta-train on and to hold out: ``load_suite("builtin")`` works offline, from the package itself."""

from .archive import DamagedFile
from .suite import ImageSet, Task, load_suite

__all__ = ["DamagedFile", "ImageSet", "Task", "load_suite"]
