"""What a training has seen so far, by step."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field

from segpipe.training.settings import CourseSettings
from segpipe.training.trainer import learning_rate


@dataclass
class History:
    """Losses and figures so far.

    losses
        Mean loss of the steps since the row before, by step.
    validations
        Figures of the averaged weights, by step.
    """

    losses: dict[int, float] = field(default_factory=dict)
    validations: dict[int, dict[str, float]] = field(default_factory=dict)

    def best(self, figure: str) -> int | None:
        """The step at which this figure was largest; the first of equals."""
        if not self.validations:
            return None
        return max(self.validations, key=lambda step: self.validations[step][figure])

    def to_csv(self, course: CourseSettings) -> str:
        """A row per validation: step, loss, learning rate, figures."""
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in self.validations.values() for name in row))
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["step", "loss", "learning rate", *names])
        for step, loss in self.losses.items():
            figures = self.validations.get(step, {})
            rate = learning_rate(course, step - 1)
            writer.writerow([step, loss, rate, *(figures.get(name, "") for name in names)])
        return text.getvalue()
