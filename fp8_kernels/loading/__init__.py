"""Loading a model so that its weights become FP8 as they arrive."""

from .loader import LayerwiseLoader
from .plan import Entry, Place, Plan, make_plan
from .report import Report
from .rules import Rules

__all__ = ["Entry", "LayerwiseLoader", "Place", "Plan", "Report", "Rules", "make_plan"]
