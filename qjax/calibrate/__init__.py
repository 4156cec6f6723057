"""Calibrate: what flows into every weight of a model, gathered once, kept, and carried through reparametrizations."""

from qjax.calibrate.files import imatrix_of, load_stats, save_stats, stats_of_imatrix
from qjax.calibrate.gradients import own_labels
from qjax.calibrate.guided import guided
from qjax.calibrate.kronecker import kronecker
from qjax.calibrate.moments import add, means, sums
from qjax.calibrate.observe import check_stats, observe
from qjax.stats import KINDS, Stats

__all__ = [
    "KINDS", "Stats", "add", "check_stats", "guided", "imatrix_of", "kronecker", "load_stats", "means", "observe",
    "own_labels", "save_stats", "stats_of_imatrix", "sums",
]  # fmt: skip
