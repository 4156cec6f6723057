"""Which format for every weight, so that the measured KL of a model of so many bytes is least."""

from qjax.budget.allocate import allocate
from qjax.budget.groups import TARGETS, Group, Target, groups_of
from qjax.budget.model import plan_for, size_of_mix
from qjax.budget.search import Candidate, Found, search
from qjax.budget.sensitivity import Choice, Sensitivity, sensitivities

__all__ = [
    "TARGETS", "Candidate", "Choice", "Found", "Group", "Sensitivity", "Target", "allocate", "groups_of", "plan_for",
    "search", "sensitivities", "size_of_mix",
]  # fmt: skip
