"""How a section of the GPU check hands over what it knows, and the results as text."""

from __future__ import annotations

import json


def hand_over(result: dict) -> None:
    """Give what a section knows by now to the process that waits for it, in case it gets no further."""
    print("\nRESULT " + json.dumps(result), flush=True)


def last_result(output: str) -> dict | None:
    """What a section handed over last."""
    found = [line.removeprefix("RESULT ") for line in output.splitlines() if line.startswith("RESULT ")]
    for text in reversed(found):
        try:
            return json.loads(text)
        except ValueError:  # cut off in the middle
            continue
    return None


LEGEND = """\
cold, warm: device time with cold and warm L2; host: until the call returns; row: a step in a row of steps; of copy:
the bytes that a step must move, in the cold time, over the copy bandwidth; times: cold time over that of the first
variant of its network and T.
notes: L2: part of these bytes stays in the L2 cache from step to step, also in cold ones, so its share of copy is no
share of memory's; host: the host takes longer to launch a step than the device to run it, so a row of steps is bound
by it."""


def table(results: dict) -> str:
    """The results as text."""
    sections, machine = results["sections"], results["machine"]
    lines = [f"{machine.get('name')}, {results['date']}", ""]
    lines += _checks(sections)
    rate = sections.get("bandwidth", {}).get("bytes_per_second")
    if rate:
        lines += [f"copy bandwidth: {rate / 1e12:.3f} TB/s", ""]
    for section in ("steps", "forms"):
        lines += _steps(sections.get(section, {}).get("rows", []), rate, machine.get("l2_bytes", 0))
    profiler = sections.get("profiler", {})
    for name, counted in profiler.get("launches", {}).items():
        lines += ["", f"Nsight Compute, {name}: {_listed(counted)}"]
    if "refused" in profiler:
        lines += ["", f"Nsight Compute: {profiler['refused'][-200:]}"]
    lines.append("")
    for name, result in sections.get("training", {}).get("loops", {}).items():
        rate = result.get("steps_per_second")
        lines.append(f"training, {name}: {result['left out'] if rate is None else f'{rate:.2f} steps/s'}")
    lines += [f"FAILED {name}: {result['error']}" for name, result in sections.items() if "error" in result]
    return "\n".join(lines) + "\n"


def _listed(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in numbers.items())


def _checks(sections: dict) -> list[str]:
    """A line for each process of the tests, each sanitizer and each counted step."""
    lines = []
    for name, result in sections.get("tests", {}).get("processes", {}).items():
        shown = [key for key in ("tests", "failures", "errors", "skipped", "error") if key in result]
        lines.append(f"tests, {name}: " + ", ".join(f"{key} {result[key]}" for key in shown))
    sanitizers = sections.get("sanitizers")
    for name, result in sanitizers.get("tools", {"compute-sanitizer": sanitizers}).items() if sanitizers else ():
        shown = {key: str(value)[:100] for key, value in result.items() if key != "seconds"}
        lines.append(f"sanitizer, {name}: {json.dumps(shown)}")
    for name, counted in sections.get("counts", {}).get("steps", {}).items():
        lines.append(f"a step, {name}: {_listed(counted)}")
    return lines


def _steps(rows: list[dict], rate: float | None, l2_bytes: int) -> list[str]:
    """The table of times. rate: the copy bandwidth."""
    if not rows:
        return []
    times = "".join(f" {name:>10}" for name in ("cold µs", "warm µs", "host µs", "row µs"))
    lines = [*LEGEND.splitlines(), f"{'network':10} {'T':>4} {'variant':26}{times} {'of copy':>8} {'times':>8}  notes"]
    ours: dict[tuple, float] = {}
    for row in rows:
        start = f"{row['network']:10} {row['tasks']:4} {row['variant']:26}"
        if "us" not in row:
            lines.append(f"{start} {row.get('error') or row.get('left out')}")
            continue
        cold, bytes_ = row["us"]["device_cold"], row.get("floor_bytes")
        share = f"{bytes_ / (1e-6 * cold) / rate:8.1%}" if rate and bytes_ else f"{'':8}"
        us = " ".join(f"{row['us'][key]:10.1f}" for key in ("device_cold", "device_warm", "host", "in_a_row"))
        times = cold / ours.setdefault((row["network"], row["tasks"]), cold)
        notes = ["L2"] * bool(bytes_ and bytes_ < 2 * l2_bytes) + ["host"] * (row["us"]["host"] > cold)
        lines.append(f"{start} {us} {share} {times:8.2f}  {', '.join(notes)}")
    return lines
