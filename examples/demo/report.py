"""The report: Markdown, the loss curves as a picture, every number as JSON."""

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import peft
import torch
import transformers

import lora_kernels
from demo.results import BASE, Joint, Results
from demo.settings import Settings
from demo.step_cost import StepCost
from demo.texts import Text

FILES = ("report.md", "loss.png", "results.json")

# Okabe and Ito's colours, told apart with every kind of colour vision; markers differ as well.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"))
BASE_COLOUR = "#555555"


def environment(settings: Settings) -> dict[str, str]:
    device = str(settings.device)
    if settings.device.type == "cuda":
        device = torch.cuda.get_device_name(settings.device)
    if settings.device.type == "cpu":
        device = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    return {
        "device": device,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "lora_kernels": lora_kernels.__version__,
    }


def write_report(results: Results, settings: Settings) -> None:
    """Writes `FILES` into `settings.out`."""
    draw_curves(results, settings.out / "loss.png")
    record = record_of(results, settings)
    write_text(settings.out / "results.json", json.dumps(record, indent=2) + "\n")
    write_text(settings.out / "report.md", markdown(results, settings))


def write_text(path: Path, text: str) -> None:
    """Writes the file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def record_of(results: Results, settings: Settings) -> dict:
    """The results as plain numbers and strings."""
    options = asdict(settings) | {
        "out": settings.out.name,
        "device": str(settings.device),
        "dtype": str(settings.dtype),
    }
    return {
        "environment": environment(settings),
        "settings": options,
        "texts": [text_record(text) for text in results.texts],
        "losses": results.losses,
        "curves": {name: asdict(curve) for name, curve in results.curves.items()},
        "checks": [asdict(check) for check in results.checks],
        "step_costs": {name: asdict(cost) for name, cost in results.costs.items()},
        "adapter_bytes": results.adapter_bytes,
        "joint": asdict(results.joint) if results.joint else None,
        "written": results.written,
        "seconds": round(results.seconds, 1),
    }


def text_record(text: Text) -> dict:
    return {
        "name": text.name,
        "title": text.title,
        "documents": text.documents,
        "characters": text.characters,
        "train_tokens": text.train.numel(),
        "held_out_tokens": text.held_out.numel(),
    }


def markdown(results: Results, settings: Settings) -> str:
    names = [text.name for text in results.texts]
    parameters = (
        f"rank {settings.rank}, alpha {settings.alpha}, dropout {settings.dropout:g} on all linear "
        f"layers, {settings.steps} steps of {settings.batch} x {settings.length} tokens, AdamW at "
        f"{settings.learning_rate:g}, seed {settings.seed}"
    )
    failed = len(results.failed)
    verdict = f"{failed} of {len(results.checks)} do not hold" if failed else "all hold"
    sections = [
        "# Two LoRA adapters on SmolLM2-135M-Instruct",
        f"Trained in {results.seconds:.0f} s, measurements included, through PEFT and "
        f"`lora_kernels.accelerate`: {parameters}. Loss is the mean per token, in nats.",
        "## Held-out loss",
        loss_table(results),
        "Rows are models, columns texts; the best of each text is bold. Of each text one document "
        "in eight was held out, whole; no long paragraph stands in both parts.",
        "![Loss during training](loss.png)",
        "## What a training step costs",
        cost_table(results.costs),
        "Medians of steps taken in turn on the same batches; *vs frozen* and *vs PEFT* are medians "
        "of the ratios turn by turn. *Frozen model* is the base without adapters, whose input "
        "requires grad. Peak memory was measured in a process for each: of the whole process, and "
        f"of the step above what was there before it ({peak_methods(results.costs)}). PEFT runs "
        "with its defaults: fp32 adapters, whatever the base.",
        *joint_sections(results, settings),
        "## What was checked",
        table(
            ("", "claim", "seen"),
            [("✓" if check.holds else "✗", check.claim, check.seen) for check in results.checks],
        ),
        f"{len(results.checks)} checks: {verdict}.",
        "## What they write",
        "Greedy, with a repetition penalty of 1.15. The adapters' models are the merged ones. "
        f"At most {settings.new_tokens} tokens.",
        *written_sections(results),
        "## Texts",
        table(
            ("name", "text", "documents", "characters", "training tokens", "held-out tokens"),
            [
                (
                    text.name,
                    text.title,
                    f"{text.documents:,}",
                    f"{text.characters:,}",
                    f"{text.train.numel():,}",
                    f"{text.held_out.numel():,}",
                )
                for text in results.texts
            ],
        ),
        "## Adapters, in PEFT's format",
        "\n".join(
            f"* `adapters/{name}` ({results.adapter_bytes[name] / 2**20:.1f} MiB): "
            f'`PeftModel.from_pretrained(model, "{settings.out.name}/adapters/{name}")`'
            for name in names
        ),
        "`accelerate` on each of them:",
        fenced(results.acceleration),
        "## Machine",
        table(("", ""), list(environment(settings).items())),
    ]
    return "\n\n".join(sections) + "\n"


def loss_table(results: Results) -> str:
    names = [text.name for text in results.texts]
    best = {name: min(row[name] for row in results.losses.values()) for name in names}
    rows = []
    for model, row in results.losses.items():
        cells = [f"**{row[n]:.4f}**" if row[n] == best[n] else f"{row[n]:.4f}" for n in names]
        rows.append((model, *cells))
    return table(("", *names), rows)


def cost_table(costs: dict[str, StepCost]) -> str:
    head = ("", "forward", "backward", "optimizer", "step")
    head += ("vs frozen", "vs PEFT", "peak", "peak of step")
    rows = [
        (
            name,
            *(f"{seconds * 1e3:.0f} ms" for seconds in (cost.forward, cost.backward)),
            f"{cost.optimizer * 1e3:.0f} ms",
            f"{cost.step * 1e3:.0f} ms",
            f"{cost.vs_frozen:.2f}x",
            f"{cost.vs_peft:.2f}x",
            mebibytes(cost.peak),
            mebibytes(cost.step_peak),
        )
        for name, cost in costs.items()
    ]
    return table(head, rows)


def joint_sections(results: Results, settings: Settings) -> list[str]:
    joint = results.joint
    if joint is None:
        return []
    return [
        "## All adapters in one batch",
        joint_table(joint),
        f"*Writing*: {joint.rows} sequences of {joint.new_tokens} new tokens, every prompt with "
        "each adapter and with none, in fp32, prompts padded to the same length. *Training step*: "
        f"{settings.batch} sequences per adapter, each adapter alone and added up, or all of them "
        "in one pass (medians). Adapters trained together start from the same values and see the "
        "same batches as apart.",
        table(
            ("held-out loss", "trained apart", "trained together"),
            [
                (name, f"{apart:.4f}", f"{together:.4f}")
                for name, (apart, together) in joint.losses.items()
            ],
        ),
    ]


def joint_table(joint: Joint) -> str:
    rows = [(f"writing: {way}", f"{seconds:.2f} s") for way, seconds in joint.writing.items()]
    rows.append(("training step: each adapter alone, added up", f"{joint.apart * 1e3:.0f} ms"))
    rows.append(("training step: all adapters in one batch", f"{joint.together * 1e3:.0f} ms"))
    return table(("", "time"), rows)


def peak_methods(costs: dict[str, StepCost]) -> str:
    return "; ".join(sorted({cost.peak_method for cost in costs.values()}))


def mebibytes(size: int | None) -> str:
    return "not measured" if size is None else f"{size / 2**20:.0f} MiB"


def written_sections(results: Results) -> list[str]:
    sections = []
    for text in results.texts:
        sections += [f"### {text.name}", "Prompt:", fenced(text.prompt)]
        for name, model, written in results.written:
            if name == text.name:
                sections += [f"{model}:", fenced(written)]
    return sections


def fenced(text: str) -> str:
    """The text as a block of code, whatever backticks it has."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text.rstrip()}\n{fence}"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def draw_curves(results: Results, path: Path) -> None:
    """One panel per adapter: the loss of each training batch, smoothed, and on held-out text."""
    figure, panels = plt.subplots(
        1, len(results.texts), figsize=(11, 5.4), sharey=True, layout="constrained", squeeze=False
    )
    for panel, text, (colour, marker) in zip(panels[0], results.texts, STYLES, strict=True):
        curve = results.curves[text.name]
        steps = range(1, len(curve.train) + 1)
        base = results.losses[BASE][text.name]
        panel.axhline(base, color=BASE_COLOUR, linestyle=":", label="held out, base model")
        panel.plot(steps, curve.train, color=colour, alpha=0.3, linewidth=1, label="training batch")
        panel.plot(
            steps, smoothed(curve.train), color=colour, linewidth=2, label="training, smoothed"
        )
        panel.plot(
            *zip(*curve.held_out, strict=True),
            color="black",
            linestyle="--",
            marker=marker,
            markersize=7,
            markerfacecolor=colour,
            label="held out, this adapter",
        )
        last_step, last = curve.held_out[-1]
        panel.annotate(
            f"{base:.2f} → {last:.2f}",
            (last_step, last),
            xytext=(0, -22),
            textcoords="offset points",
            ha="right",
            bbox=dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1),
        )
        panel.set_title(f"Adapter {text.name}")
        panel.set_xlabel("training step")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    panels[0][0].set_ylabel("loss per token (nats)")
    figure.suptitle("SmolLM2-135M-Instruct: LoRA fine-tuning with PEFT and lora_kernels.accelerate")
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=150)
    plt.close(figure)
    os.replace(partial, path)


def smoothed(values: list[float], window: int = 15) -> list[float]:
    """The mean of up to `window` values around each, fewer at both ends."""
    half = window // 2
    slices = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in slices]
