"""What ranks tell each other: what each one has, what has to be the same, and what is wrong where it is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cts_fast._version import __version__
from cts_fast.engine.gradients import NonFiniteGradient
from cts_fast.engine.plan import OPTIONS
from cts_fast.engine.rules.sgd import Hyper
from cts_fast.engine.state import COUNTERS

if TYPE_CHECKING:
    from cts_fast.engine.engine import Engine

LAYOUT, PHI_DIGEST = "the shared parameters", "a digest of the initialization"  # facts
BLOCK = 1 << 18  # numbers that a digest takes at a time
ODD = 0x1E35A7BD  # any odd number that is not small


class RankError(RuntimeError):
    """What every rank raises, because of one of them or because one cannot be reached; it is not sent to the others."""


class RanksDiffer(ValueError, RankError):
    """What every rank raises where something differs that must be the same on all of them."""


class Torn(RankError):
    """What a rank raises that takes no step; the others may not know yet."""


class NonFiniteOnRank(RankError, NonFiniteGradient):
    """What every rank raises, with nonfinite="raise", where one had gradients that were not finite.

    rank: that one; task: the index of its task there; parameter: its name.
    """

    def __init__(self, rank: int, task: int, parameter: str) -> None:
        NonFiniteGradient.__init__(self, task, parameter)
        self.rank = rank

    def __str__(self) -> str:
        return f"rank {self.rank}, {super().__str__()}"


@dataclass
class Report:
    """What a rank tells the others."""

    call: str = ""  # what it is in, for messages
    tasks: int = 0  # it has so many
    facts: dict[str, Any] = field(default_factory=dict)  # the same on every rank, or it is an error that names them
    error: str = ""  # what it raised
    found: Any = None  # what else it is asked


def facts_of(engine: Engine, groups: Sequence[Mapping], **further: Any) -> dict[str, Any]:
    """What must be the same on every rank: versions, counters, the options of shared groups, and shared parameters.

    further: what else must be.
    """
    facts: dict[str, Any] = {"cts_fast's version": __version__, "torch's version": torch.__version__, **further}
    facts |= {**dict(zip(COUNTERS, engine.counters.read(), strict=True)), **_options(groups)}
    places = {id(segment): i for i, (_, flat) in enumerate(engine.shared) for segment in flat.segments}
    segments = [segment for segment in engine.segments if segment.task is None]
    facts["the number of shared parameters"] = len(segments)
    for i, segment in enumerate(segments):
        facts[f"the name of shared parameter {i}"] = segment.name
        facts[f"the shape of parameter {segment.name!r}"] = tuple(segment.shape)
        facts[f"the dtype of parameter {segment.name!r}"] = str(segment.params[0].dtype)
        facts[f"the strides of parameter {segment.name!r}"] = segment.stride
    facts[LAYOUT] = [(s.name, tuple(s.shape), s.stride, str(s.params[0].dtype), places[id(s)]) for s in segments]
    return facts


def facts_of_saved(
    saved: Sequence[Mapping],
    groups: Sequence[Mapping],
    entries: Sequence[tuple[Tensor, Mapping]],
    further: Iterable[str],
) -> dict[str, Any]:
    """What must be the same in the parts of a checkpoint that the ranks load; further: options of the method."""
    merged = [{**group, **own, "shared": group["shared"]} for group, own in zip(groups, saved, strict=True)]
    counters = [entry["counters"].tolist() for _, entry in entries if "counters" in entry]
    phis = [entry["initialization"] for _, entry in entries if "initialization" in entry]
    found = {"the counters": counters, **_options(merged), **{name: merged[0][name] for name in further}}
    found[PHI_DIGEST] = int(digest(phis, torch.device("cpu")))
    return {
        f"in the loaded state dict, {name}" if name != PHI_DIGEST else PHI_DIGEST: value
        for name, value in found.items()
    }


def _options(groups: Sequence[Mapping]) -> dict[str, Any]:
    facts = {}
    for i, group in enumerate(group for group in groups if group["shared"] and group["params"]):
        for name in (*Hyper._fields, *OPTIONS):
            value = group[name]
            facts[f"{name} of shared group {i}"] = value.item() if isinstance(value, Tensor) else value
    return facts


def digest(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """32 bits, as int64 on `device`, that tell the bits of float tensors from those of others in all likelihood."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        words = tensor.detach().contiguous().view(-1).view(torch.int32)
        for block in words.split(BLOCK):
            weights = torch.arange(len(block), device=block.device).mul_(2 * ODD).add_(ODD)  # odd ones
            total = total * ODD + weights.mul_(block).sum().to(device)  # both wrap around
    return (total >> 32 ^ total) & 0xFFFFFFFF


def disagreement(reports: Sequence[Report]) -> RankError | None:
    """What is wrong, the same words on every rank; None if nothing is."""
    for r, report in enumerate(reports):
        if report.error:
            return RankError(f"rank {r} raised, so that no rank goes on: {report.error}")
    first = reports[0].facts
    for r, report in enumerate(reports[1:], 1):
        if report.call != reports[0].call:
            calls = f"rank {r} is in {report.call}, but rank 0 in {reports[0].call}"
            return RankError(f"{calls}; every rank makes the same calls in one order")
        for name in {**first, **report.facts}:
            here, there = report.facts.get(name), first.get(name)
            if here == there:
                continue
            if name == PHI_DIGEST:
                return RankError(f"the initialization of rank {r} is not rank 0's; load the same weights on every rank")
            return RanksDiffer(f"process_group: {name} is {here!r} on rank {r}, but {there!r} on rank 0")
    return None


def in_words(error: Exception) -> str:
    """What a rank tells the others of what it raised."""
    return f"{type(error).__name__}: {error}"
