"""Tasks over the ranks of a torch.distributed group."""

from cts_fast.distributed.agreement import NonFiniteOnRank, RankError, RanksDiffer, Report, facts_of, facts_of_saved
from cts_fast.distributed.by_task import StateByTask
from cts_fast.distributed.ranks import Ranks, check_over_ranks, together

__all__ = [
    "NonFiniteOnRank",
    "RankError",
    "Ranks",
    "RanksDiffer",
    "Report",
    "StateByTask",
    "check_over_ranks",
    "facts_of",
    "facts_of_saved",
    "together",
]
