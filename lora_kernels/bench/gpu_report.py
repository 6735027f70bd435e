"""The report of `make gpu-check` in Markdown, made from its rows alone."""

import statistics

from lora_kernels.bench import report

# What issue and design ask for: forward and backward at this cell, over frozen.
FIRST_CELL = {"m": 8192, "k": 4096, "n": 4096, "rank": 16}
TARGET_OVER_FROZEN = 1.10


def markdown(rows: list[dict], command: str) -> str:
    parts = ["# GPU check", _machine(rows), f"Made by `{command}`.", _sections(rows)]
    parts += [_failures(rows), _targets(rows), _providers(rows)]
    benchmarks = [row for row in rows if row["kind"] in report.QUANTITIES]
    parts += [_cells(rows)] if benchmarks else []
    parts += [_kernels(rows, "decode", "Decoding with one adapter, over the frozen layer")]
    parts += [_kernels(rows, "y", "The GEMM of y with its tail, over the GEMM alone")]
    parts += [_kernels(rows, "dx", "The GEMM of dx with its tail, over the GEMM alone")]
    parts += ["## Every case", report.markdown(benchmarks)] if benchmarks else []
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(headers: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(headers) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [headers, rule, *lines])


def _machine(rows: list[dict]) -> str:
    found = next((row for row in rows if row["kind"] == "environment"), None)
    if found is None:
        return "The machine could not be described."
    versions = ", ".join(f"{name} {value or 'absent'}" for name, value in found["versions"].items())
    lines = [f"**{found['device']}**, {found['time']}", versions]
    if "driver" in found:
        lines.append(
            f"driver {found['driver']}, CUDA {found['cuda']}, compute capability "
            f"{found['capability']}, {found['multiprocessors']} SMs, "
            f"{found['memory_bytes'] / 1e9:.0f} GB, L2 {found['cache_bytes'] / 1e6:.0f} MB"
        )
    lines.append(f"nvcc: {found['nvcc'] or 'absent'}")
    if found["missing"]:
        lines.append(f"not installed and not needed here: {', '.join(found['missing'])}")
    for row in rows:
        if row["kind"] == "build":
            lines.append(f"extension: {row['seconds']} s to build; CUDA kernels: {row['status']}")
        if row["kind"] == "ceilings":
            lines.append(
                f"measured ceilings: bf16 GEMM {row['bf16']['flops_per_second'] / 1e12:.0f} TFLOP/s"
                f" on random data, fp32 GEMM {row['fp32']['flops_per_second'] / 1e12:.1f}, copy "
                f"{row['bf16']['bytes_per_second'] / 1e12:.2f} TB/s (read + written)"
            )
    return "  \n".join(lines)


def _checks(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["kind"] == "check"]


def _sections(rows: list[dict]) -> str:
    states = ("passed", "failed", "skipped")
    lines = [
        [row["title"], row["state"]]
        + [str(row["states"].get(state, 0)) for state in states]
        + [f"{row['seconds']:.0f}", (row["detail"] or "").replace("|", "/")[:200]]
        for row in _checks(rows)
        if row["unit"] is None
    ]
    return _table(["section", "state", *states, "seconds", "note"], lines)


def _failures(rows: list[dict]) -> str:
    found = [row for row in _checks(rows) if row["unit"] and row["state"] != "passed"]
    if not found:
        return ""
    lines = [
        f"* **{row['state']}** {row['section']}: {row['unit']}\n\n      "
        + (row["detail"] or "").replace("\n", "\n      ")
        for row in sorted(found, key=lambda row: row["state"])
    ]
    return "## What did not pass\n\n" + "\n".join(lines)


# ---- the core grid


def cells_of(rows: list[dict]) -> list[dict[str, dict]]:
    """provider -> row of each measured call."""
    groups = report.by_case([row for row in rows if row["kind"] == "op"])
    return [{row["provider"]: row for row in group if not row["skipped"]} for group in groups]


def ratio(cell: dict[str, dict], above: str, below: str, quantity: str = "both") -> float | None:
    """Median of above / below, taken repetition by repetition; None where one is missing."""
    if above not in cell or below not in cell:
        return None
    samples = (cell[name]["seconds"][quantity]["samples"] for name in (above, below))
    return statistics.median(a / b for a, b in zip(*samples, strict=True))


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.geometric_mean(known):.2f}" if known else "-"


def _providers(rows: list[dict]) -> str:
    cells = cells_of(rows)
    if not cells:
        return ""
    names = list(dict.fromkeys(name for cell in cells for name in cell))
    lines = []
    for name in names:
        over_composed = [r for c in cells if (r := ratio(c, name, "composed")) is not None]
        lines.append([
            name,
            str(sum(name in cell for cell in cells)),
            _mean([ratio(cell, name, "frozen") for cell in cells]),
            _mean([ratio(cell, "naive", name) for cell in cells]),
            _mean([ratio(cell, "naive-fp32", name) for cell in cells]),
            f"{max(over_composed):.2f}" if over_composed else "-",
        ])  # fmt: skip
    headers = ["provider", "cells", "/ frozen", "naive /", "naive-fp32 /", "worst / composed"]
    return (
        f"## Geometric means over {len(cells)} cells, forward and backward\n\n"
        + _table(headers, lines)
        + "\n\n*naive-fp32* is PEFT's default arithmetic, fp32 adapters over a bf16 base."
    )


def _targets(rows: list[dict]) -> str:
    lines = []
    for cell in cells_of(rows):
        case = next(iter(cell.values()))["case"] if cell else {}
        if any(case.get(key) != value for key, value in FIRST_CELL.items()):
            continue
        for name in ("ours", "composed", "triton-hybrid", "triton-fused", "native"):
            found = ratio(cell, name, "frozen")
            if found is not None:
                verdict = "met" if found <= TARGET_OVER_FROZEN else "**missed**"
                lines.append([name, f"{case['dropout']:g}", f"{found:.3f}", verdict])
    if not lines:
        return ""
    sizes = "M=8192, K=N=4096, r=16, forward and backward over frozen"
    headers = ["provider", "dropout", "/ frozen", f"at most {TARGET_OVER_FROZEN:.2f}"]
    return f"## {sizes}\n\n" + _table(headers, lines)


def _cells(rows: list[dict]) -> str:
    """A line per call: milliseconds of frozen, everybody else over it."""
    cells = [cell for cell in cells_of(rows) if "frozen" in cell]
    if not cells:
        return ""
    names = list(dict.fromkeys(name for cell in cells for name in cell if name != "frozen"))
    lines = []
    for cell in cells:
        frozen = cell["frozen"]
        seconds, case = frozen["seconds"]["both"]["median"], frozen["case"]
        line = [f"{case['m']}x{case['k']}x{case['n']} r {case['rank']} p {case['dropout']:g}"]
        line.append(f"{seconds * 1e3:.3f}")
        line.append(f"{frozen['floor']['both'] / seconds:.2f}" if frozen["floor"] else "-")
        for name in names:
            found = ratio(cell, name, "frozen")
            line.append("-" if found is None else f"{found:.2f}")
        lines.append(line)
    headers = ["M x K x N", "frozen, ms", "floor / frozen", *(f"{name} /" for name in names)]
    return "## The core cells, over frozen\n\n" + _table(headers, lines)


def _kernels(rows: list[dict], what: str, title: str) -> str:
    """A line per call without a backward: microseconds of frozen, everybody else over it."""
    groups = report.by_case(
        [row for row in rows if row["kind"] == "kernel" and row["case"]["what"] == what]
    )
    cells = [{row["provider"]: row for row in group if not row["skipped"]} for group in groups]
    cells = [cell for cell in cells if "frozen" in cell]
    if not cells:
        return ""
    names = list(dict.fromkeys(name for cell in cells for name in cell if name != "frozen"))
    lines = []
    for cell in cells:
        case = cell["frozen"]["case"]
        line = [f"{case['m']}x{case['k']}x{case['n']} r {case['rank']} p {case['dropout']:g}"]
        line.append(f"{cell['frozen']['seconds']['forward']['median'] * 1e6:.1f}")
        for name in names:
            found = ratio(cell, name, "frozen", "forward")
            line.append("-" if found is None else f"{found:.3f}")
        lines.append(line)
    headers = ["M x K x N", "frozen, us", *(f"{name} /" for name in names)]
    return f"## {title}\n\n" + _table(headers, lines)
