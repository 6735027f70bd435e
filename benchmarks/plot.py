"""The plot of README.md: what a training step costs over the frozen model, in time and memory."""

import json
from pathlib import Path

from benchmarks import report

# In this order, as far as the results hold them; a label and a colour each.
PROVIDERS = {
    "frozen": ("frozen model", "#8b949e"),
    "naive": ("naive LoRA", "#d9a036"),
    "peft": ("PEFT", "#d1663f"),
    "ours": ("lora_kernels", "#2f81c9"),
}
# Readable on white and on black.
INK = "#7d8590"


def facts(groups: list[list[dict]]) -> dict:
    """What is drawn, as plain values: of each case and provider the ratio and the bytes."""
    drawn, spread = {}, ("median", "q1", "q3")
    for rows in groups:
        case, found = rows[0]["case"], {row["provider"]: row for row in rows if not row["skipped"]}
        drawn[f"{case['dtype']}, dropout {case['dropout']:g}"] = {
            name: {
                "over frozen": [round(found[name]["over_frozen"]["step"][q], 4) for q in spread],
                "saved": found[name]["saved_bytes"],
            }
            for name in PROVIDERS
            if name in found
        }
    case = groups[0][0]["case"]
    sizes = f"{case['batch']}x{case['length']} tokens, r {case['rank']}"
    caption = f"A training step of a Llama of SmolLM2-135M's shape, {sizes}; {machines(groups)}"
    return {"caption": caption, "cases": drawn}


def machines(groups: list[list[dict]]) -> str:
    """Where it was measured; by dtype where that differs."""
    found: dict[str, str] = {}
    for rows in groups:
        found.setdefault(rows[0]["case"]["dtype"], report.machine_of(rows[0]["meta"]))
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return "; ".join(f"{dtype}: {machine}" for dtype, machine in found.items())


def facts_in(path: Path) -> dict | None:
    """What a plot that was drawn before shows."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("<dc:description>"):
            text = line.strip().removeprefix("<dc:description>").removesuffix("</dc:description>")
            return json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return None


def draw(shown: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    # The same facts give the same file, so that a committed plot changes only with its numbers.
    style = {
        "svg.hashsalt": "lora_kernels", "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.4), layout="constrained")
        time, memory = figure.subplots(1, 2)
        names = [n for n in PROVIDERS if any(n in each for each in shown["cases"].values())]
        width = 0.8 / len(names)
        for place, name in enumerate(names):
            label, colour = PROVIDERS[name]
            at, over, whiskers, saved = [], [], [], []
            for number, providers in enumerate(shown["cases"].values()):
                if name in providers:
                    median, q1, q3 = providers[name]["over frozen"]
                    at.append(number + (place - (len(names) - 1) / 2) * width)
                    over.append(median)
                    whiskers.append((median - q1, q3 - median))
                    saved.append(providers[name]["saved"] / 1e6)
            bars = time.bar(
                at, over, width * 0.92, color=colour, label=label,
                yerr=list(zip(*whiskers, strict=True)), ecolor=INK,
            )  # fmt: skip
            time.bar_label(bars, [f"{value:.2f}" for value in over], padding=1, fontsize=6.5)
            bars = memory.bar(at, saved, width * 0.92, color=colour)
            memory.bar_label(bars, [f"{value:.0f}" for value in saved], padding=1, fontsize=6.5)
        for axis, title in (
            (time, "time of a step / frozen"),
            (memory, "saved for the backward, MB"),
        ):
            axis.set_title(title, fontsize=9)
            axis.margins(y=0.1)
            labels = [name.replace(", ", "\n") for name in shown["cases"]]
            axis.set_xticks(range(len(labels)), labels, fontsize=8)
        time.axhline(1.0, color=INK, linewidth=0.6)
        figure.legend(loc="outside lower center", ncols=len(names), frameon=False)
        figure.suptitle(shown["caption"], fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"Date": None, "Description": json.dumps(shown)}
        figure.savefig(path, transparent=True, metadata=about)
