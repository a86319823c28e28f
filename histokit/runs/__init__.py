"""What a run is: its folder, its key, its recipe, and what can be asked of it later."""

from histokit.runs.run import Run, folder, parameters, start
from histokit.runs.states import check, mark_failed

__all__ = ["Run", "check", "folder", "mark_failed", "parameters", "start"]
