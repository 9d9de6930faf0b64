"""The forms of the importance: how it follows from A and dt. A new form is one more entry of `FORMS`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class ImportanceForm:
    """One formula for the importance, as `config.flash_dmattn["importance"]` names it.

    formula: how it is written in help texts.
    score: (A, dt) -> A times a function of dt that strictly rises for |dt| <= 20, which calibration needs; A (Hi, 1),
        dt and result (B, Hi, S), all in one dtype.
    initial_A: where A starts when no checkpoint gives it.
    max_exponent: the importance is exp(score) with the score clamped here; None: it is the score.
    is_fused: whether `flash_dmattn.token_importance` computes it, which knows A * softplus(dt) as score.
    """

    formula: str
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    initial_A: float = 0.0
    max_exponent: float | None = None
    is_fused: bool = False

    def __call__(self, A: torch.Tensor, dt: torch.Tensor) -> torch.Tensor:
        """Returns the importance (B, Hi, S), in the dtype of A (Hi, 1) and dt (B, Hi, S)."""
        score = self.score(A, dt)
        return score if self.max_exponent is None else score.clamp(max=self.max_exponent).exp()


def _scaled_softplus(A: torch.Tensor, dt: torch.Tensor) -> torch.Tensor:
    return A * F.softplus(dt)


PAPER_FORM, DEFAULT_FORM = "zoh", "log_zoh"

FORMS: dict[str, ImportanceForm] = {
    # Eq. 3 of the paper; exp(80) is still finite in float32
    PAPER_FORM: ImportanceForm("exp(A * softplus(dt))", _scaled_softplus, max_exponent=80.0, is_fused=True),
    DEFAULT_FORM: ImportanceForm("A * softplus(dt)", _scaled_softplus, is_fused=True),
}
"""Name -> form. Read by the config, the command line, the gates and calibration."""
