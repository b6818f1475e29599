"""What the sequences of a calibration are for where weights are computed from text."""

from __future__ import annotations

from streamprune.calibration.refit_text import IMATRIX_TOKENS, with_refit, with_text
from streamprune.calibration.sequences import Calibration
from streamprune.config import RunSettings
from streamprune.models.skeleton import Skeleton
from streamprune.planning.counts import ExpertCounts
from streamprune.planning.refit import refit_demand
from streamprune.planning.rounding import rounding_demand


def with_uses(settings: RunSettings, calibration: Calibration, skeleton: Skeleton, counts: ExpertCounts) -> Calibration:
    """The calibration with what its sequences are for in the refit, the rounding and the importance matrix of a run.

    Raises CalibrationError for too little text, UnsupportedModelError for weights that cannot be computed.
    """
    rounding = rounding_demand(skeleton, counts).tokens if settings.needs_text else 0
    tokens = max(rounding, IMATRIX_TOKENS if settings.imatrix is not None else 0)
    if settings.refit:
        return with_refit(calibration, refit_demand(skeleton, counts), tokens)
    return with_text(calibration, tokens)
