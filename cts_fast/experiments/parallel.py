"""Tasks side by side on a CPU: one thread a task beats many threads on one small network."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def task_map(device: torch.device | str) -> Iterator[Callable[..., list]]:
    """Yields `map` as a list: on a CPU as many calls at a time as torch has threads, each computing on one thread.

    Every call computes the same on one thread as on any machine's number of threads, so results do not depend on how
    many run at a time. On other devices calls run one after the other. torch's thread count is restored at the end.
    """
    if torch.device(device).type != "cpu":
        yield lambda function, *arguments: list(map(function, *arguments))
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield lambda function, *arguments: list(pool.map(function, *arguments))
    finally:
        torch.set_num_threads(threads)
