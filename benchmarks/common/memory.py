"""Memory of a variant: what it keeps and what a step takes for a moment, from torch's own allocation records."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocated(run: Callable[[], object]) -> tuple[int, int, object]:
    """(bytes that `run` left allocated, the most that it held at once, its result), both counted from its start.

    Counts the CPU allocations that torch makes, those of compiled code included; a few kilobytes inside native calls
    are not seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    held = peak = 0
    records = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(records, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return held, peak, result


def step_memory(
    make: Callable[[], object], settle: Callable[[object], object], parameter_bytes: int
) -> dict[str, object]:
    """Mebibytes beyond parameters and gradients: `kept` between steps, and the `peak` during one; and the `variant`.

    make: builds the variant. settle: takes its first steps, in which lazy state appears.
    """

    def build() -> object:
        variant = make()
        settle(variant)
        return variant

    kept, _, variant = allocated(build)
    _, transient, _ = allocated(variant.step)
    kept -= parameter_bytes
    return {"kept_mib": kept / 2**20, "peak_mib": (kept + transient) / 2**20, "variant": variant}
