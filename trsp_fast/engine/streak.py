"""How many steps in a row were not finite, and when that is enough."""

from torch import Tensor

from trsp_fast.errors import Diverged

LONGEST = 3  # one bad batch is skipped; three in a row are no accident


class Streak:
    """Counts steps that were not applied because loss or gradient was not finite.

    stage, rate: names of the stage and of its learning rate, for the sentence.
    """

    def __init__(self, stage: str, rate: str) -> None:
        self.stage, self.rate, self.count = stage, rate, 0

    def take(self, finite: bool, what: str, where: str, rows: Tensor) -> None:
        """The verdict on one step.

        Raises:
            Diverged: it was the third bad one in a row.
        """
        self.count = 0 if finite else self.count + 1
        if self.count >= LONGEST:
            windows = ", ".join(map(str, rows.tolist()[:8])) + (", ..." if len(rows) > 8 else "")
            raise Diverged(
                f"the {what} in {where} of stage {self.stage} (calibration windows {windows}), the third step in a row "
                f"that is not finite; check the weights and the data, or lower {self.rate}."
            )
