"""Image tasks to meta-train on and to hold out: ``load_suite("builtin")`` works offline, from the package itself."""

from cts_fast.data.cache import Storage
from cts_fast.data.errors import DamagedFile, MissingData
from cts_fast.data.folder import FolderSuite
from cts_fast.data.paper.suite import PaperSuite
from cts_fast.data.suite import SUITES, ImageSet, Task, load_suite, register, task_roles

SUITES["paper"] = PaperSuite("paper")
SUITES["imagenet"] = PaperSuite("imagenet", size=224)
SUITES["folder"] = FolderSuite()

__all__ = ["DamagedFile", "ImageSet", "MissingData", "Storage", "Task", "load_suite", "register", "task_roles"]
