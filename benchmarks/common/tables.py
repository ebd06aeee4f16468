"""The report as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

TITLES = {"resnet20": "ResNet20", "resnet18": "ResNet18", "mlp": "MLP", "transformer": "transformer"}
# the targets: fraction of the ceiling, and times each variant; the best compiled variant that gathers gradients counts
TARGETS = {
    ("resnet18", "step(), cpu"): {"ceiling": 0.95, "naive": 15, "foreach": 6, "fused": 4.4, "compiled": 2},
    ("resnet20", "native call, cpu"): {"ceiling": 0.85, "naive": 28, "foreach": 11, "fused": 6, "compiled": 2.7},
    ("resnet20", "step(), cpu"): {"ceiling": 0.70, "naive": 22, "foreach": 9, "fused": 5, "compiled": 2.2},
}
MANY_TASKS = {32: 1.1, 128: 1.2}  # T → at most that many times the 3-read-2-write time of the same bytes
# ms beyond the native call
HOST = {"step, same gradients": 0.3, "step, same gradients, warm": 0.3, "step, fresh gradients": 0.6}
COMPILED = ("compiled flat + copy", "compiled unrolled + copy")


LEGEND = """\
Times are medians of paired runs: all variants of a table take turns within every repeat, in a new order each time;
in brackets the 16th and 84th percentile. GB/s counts (5T + 2)·P·4 bytes, the fewest that a step can move, whatever
a variant really moves. “Of ceiling” compares with an in-place 3-read-2-write of 450 MB in the same repeats, “×” with
the whole `step()` on the `cpu` backend, both as medians of the ratios within a repeat. Cold: a buffer of three times
the last-level cache is walked before each run. Warm: the same variant ran just before. Every variant was checked
against the float64 reference equations before it was timed. Memory is what stays allocated, and the most that a step
holds, beside parameters and gradients. A repeat in which other processes were busy is left out while enough quiet
ones remain.""".replace("\n", " ")


def markdown(result: Mapping, figures: Sequence[str]) -> str:
    """All tables of a result of `benchmarks.report`, figures by file name."""
    parts = [
        "# The step, measured",
        _conditions(result),
        *([f"**{result['note']}**"] if "note" in result else []),
        LEGEND,
        _ceiling(result["ceiling"]),
        *_goals(result),
        *[f"![{name}]({name})" for name in figures],
        "## Every set-up",
        *[_steps(table) for table in result["steps"]],
        *([_host(result["host"])] if result["host"] else []),
        *_whole(result["whole_steps"]),
        *[_methods(methods) for methods in result["methods"]],
    ]
    return "\n\n".join(parts) + "\n"


def _conditions(result: Mapping) -> str:
    machine = result["machine"]
    hardware = (
        f"{machine['processor']} (family/model {machine['family_model']})",
        f"{machine['cores']} cores",
        f"{machine['threads']} threads",
        f"last-level cache {machine['last_level_cache_bytes'] >> 20} MiB",
        f"{machine['memory_gib']} GiB memory",
        str(machine["vectors"]),
    )
    software = (
        str(machine["system"]),
        f"Python {machine['python']}",
        f"torch {machine['torch']}",
        f"cts_fast {machine['cts_fast']}",
        str(machine["compiler"]),
    )
    load = f"; load average at the start {machine['load_average']}" if "load_average" in machine else ""
    run = f"`{result['command']}`, {result['date']}, {result['seconds']} s{load}."
    return f"{', '.join(hardware)}; {', '.join(software)}.  \n{run}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ms(row: Mapping) -> str:
    return f"{row['ms']:.3g} ({row['ms_low']:.3g} – {row['ms_high']:.3g})"


def _ceiling(ceiling: Mapping) -> str:
    best = max(ceiling["gb_per_s"].values())
    rows = [(name, f"{rate:.1f}", "best" if rate == best else "") for name, rate in ceiling["gb_per_s"].items()]
    table = _table(("form", "GB/s", ""), rows)
    text = "## The machine's ceiling\n\nIn-place 3-read-2-write of 450 MB, threads as torch has them."
    # reports made before have one of them
    alone = ceiling.get("alone_gb_per_s", {"reads": ceiling["reads_gb_per_s"]} if "reads_gb_per_s" in ceiling else {})
    lines = [f"{name.capitalize()} alone, of 450 MB: {rate:.1f} GB/s." for name, rate in alone.items()]
    return "\n\n".join([text, table, *([" ".join(lines)] if lines else [])])


GOALS = ("", "of ceiling", "× released form", "× naive loop", "× foreach", "× fused + foreach", "× compiled + copy")


def _goals(result: Mapping) -> list[str]:
    cold = [table for table in result["steps"] if table["caches"] == "cold"]
    rows = []
    for (network, ours), targets in TARGETS.items():
        for table in cold:
            if (table["network"], table["tasks"]) == (network, 8) and ours in table["variants"]:
                rows.append(_goal(table, ours, targets))
    parts = []
    if rows:
        title = "## Against the goals, T = 8, cold caches\n\nMeasured / goal.\n\n"
        parts.append(title + _table(GOALS, rows))
    many = []
    for table in cold:
        for ours, key in (("native call, cpu", "times_native"), ("step(), cpu", "times_step")):
            if table["tasks"] in MANY_TASKS and ours in table["variants"]:
                many.append(_many_tasks(table, ours, key))
    if many:
        parts.append(_table(("many tasks, cold", "ms", "× 3-read-2-write of the same bytes / goal"), many))
    return parts


def _many_tasks(table: Mapping, ours: str, key: str) -> list[str]:
    tasks, variants = table["tasks"], table["variants"]
    times = 1 / variants["3-read-2-write, same bytes"][key]
    name = f"{TITLES[table['network']]}, T = {tasks}, {ours}"
    return [name, f"{variants[ours]['ms']:.3g}", f"{times:.2f} / {MANY_TASKS[tasks]}"]


def _goal(table: Mapping, ours: str, targets: Mapping) -> list[str]:
    variants, key = table["variants"], "times_native" if ours.startswith("native") else "times_step"
    compiled = [variants[name][key] for name in COMPILED if name in variants]
    return [
        f"{TITLES[table['network']]}, {ours}",
        f"{variants[ours]['of_ceiling']:.2f} / {targets['ceiling']}",
        f"{variants['released form'][key]:.1f} / {targets['naive']}" if "released form" in variants else "–",
        f"{variants['naive loop'][key]:.1f}",
        f"{variants['foreach'][key]:.1f} / {targets['foreach']}",
        f"{variants['fused + foreach'][key]:.1f} / {targets['fused']}",
        f"{min(compiled):.1f} / {targets['compiled']}" if compiled else "–",
    ]


def _steps(table: Mapping) -> str:
    numbers = f"{table['parameters'] / 1e6:.2f} M), T = {table['tasks']}, {table['caches']} caches"
    title = f"### {TITLES[table['network']]} ({numbers}: {table['floor_bytes'] / 1e6:.0f} MB"
    quiet = f"{table['quiet_repeats']} of {table['repeats']} repeats were quiet."

    def row_of(name: str, row: Mapping) -> tuple[str, ...]:
        times = f"{row['times_step']:.2f}" if "times_step" in row else "–"
        memory = f"{row['kept_mib']:.1f} / {row['peak_mib']:.1f}" if "kept_mib" in row else "–"
        return name, _ms(row), f"{row['gb_per_s']:.1f}", f"{100 * row['of_ceiling']:.0f} %", times, memory

    rows = [row_of(name, row) for name, row in table["variants"].items()]
    shown = _table(("", "ms", "GB/s", "of ceiling", "×", "MiB kept / peak"), rows)
    missing = "".join(f"\n\nLeft out: {name} ({reason})." for name, reason in table["missing"].items())
    return f"{title}\n\n{quiet}\n\n{shown}{missing}"


def _host(host: Mapping) -> str:
    rows = [
        (name, _ms(row), f"{row['host_ms']:.3f} / {HOST[name]}" if "host_ms" in row else "–")
        for name, row in host["rows"].items()
    ]
    text = (
        f"## Host time, `{host['backend']}` backend\n\n"
        f"Eight ResNet20s with heads, {host['gradients']} gradients from real backward passes. "
        "Fresh gradients are tensors that Python has not seen yet.\n\n"
    )
    return text + _table(("", "ms", "beyond the native call, ms / goal"), rows)


def _whole(whole: Mapping) -> list[str]:
    if not whole:
        return []
    text = (
        "## Whole training steps\n\nOn a CPU the network takes nearly all of a step: a faster update shortens training "
        "by no more than the share that the naive loop's update has here. bf16: the same passes under autocast, and "
        "their time over float32's.\n\n"
    )
    head = ("", "forward and backward, ms", "in bf16, ms", "`step()`, ms", "share", "naive loop, ms", "share")
    return [text + _table(head, [_whole_step(network, steps) for network, steps in whole.items()])]


def _whole_step(network: str, steps: Mapping) -> list[str]:
    rows, share = steps["rows"], steps["share"]
    passes = rows["forward and backward"]
    images = f"{steps['images']} images of {steps['side']} px a task"
    line = [f"{TITLES[network]}, T = {steps['tasks']}, {images}", _ms(passes), _bf16(rows, passes)]
    for update in ("update, step()", "update, naive loop"):
        line += [_ms(rows[update]), f"{100 * share[update]:.2f} %"]
    return line


def _bf16(rows: Mapping, passes: Mapping) -> str:
    bf16 = rows.get("forward and backward, bf16")  # reports made before it was measured have none
    return f"{_ms(bf16)}, × {bf16['ms'] / passes['ms']:.2f}" if bf16 else "–"


def _methods(methods: Mapping) -> str:
    def row_of(name: str, row: Mapping) -> tuple[str, ...]:
        heldout = f"{row['heldout_ms']:.3g}" if row.get("heldout_ms") else "–"
        added = f"{row['added_ms']:.3g}" if "added_ms" in row else "–"  # reports made before have none
        ratio = f"{row['ratio']:.2f} / {methods['allowance']}"
        return name, _ms(row), f"{row['inner_ms']:.3g}", heldout, f"{row['added_bytes'] / 1e6:.0f}", added, ratio

    text = (
        f"## Methods, {methods['setup']}\n\nThe last column: a step over the fused inner step, autograd's time for the "
        "held-out gradients that the method takes, and the bytes that its definition adds, priced at the ceiling, "
        "reads and writes beyond three for two at what reads and writes alone get (`benchmarks/cpu/method_cost.py`). "
        "Times are means of two optimizers whose memory lies elsewhere.\n\n"
    )
    head = ("step", "ms", "inner step, ms", "held-out gradients, ms", "added MB", "their price, ms", "ratio / goal")
    return text + _table(head, [row_of(name, row) for name, row in methods["rows"].items()])
