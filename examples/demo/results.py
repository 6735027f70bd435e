"""What the demo finds out, as it goes along."""

from dataclasses import dataclass, field

from demo.step_cost import StepCost
from demo.texts import Text
from demo.train import Curve

BASE = "base"


@dataclass
class Check:
    """Something the report claims. seen: the numbers that decide it."""

    claim: str
    seen: str
    holds: bool


@dataclass
class Joint:
    """What it took to serve and to train all adapters at once.

    rows, new_tokens: of the batch that was written. writing: seconds of each way to write it.
    apart: seconds of a training step of each adapter alone, added up. together: seconds of the step
    that trains all of them. losses: by text, held out: trained apart, trained together.
    """

    rows: int = 0
    new_tokens: int = 0
    writing: dict[str, float] = field(default_factory=dict)
    apart: float = 0.0
    together: float = 0.0
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass
class Results:
    """losses: by model (`BASE`, or an adapter's name), then by text; nats per token. written: text,
    model, and what it wrote after the text's prompt. acceleration: the report of `accelerate`."""

    texts: list[Text]
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    written: list[tuple[str, str, str]] = field(default_factory=list)
    costs: dict[str, StepCost] = field(default_factory=dict)
    adapter_bytes: dict[str, int] = field(default_factory=dict)
    acceleration: str = ""
    joint: Joint | None = None
    seconds: float = 0.0

    def check(self, claim: str, holds: bool, seen: str) -> None:
        self.checks.append(Check(claim, seen, holds))

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.holds]
