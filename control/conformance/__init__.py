"""Plays control and a parent, frame by frame, against any worker, and says what of docs/protocol.md it keeps to.

``control.cli.conformance`` is the command.
"""

from control.conformance import attempts, joining, leaving, links, refusals, steps, versions
from control.conformance.case import Case, Result, named_cases, play_case

__all__ = ["CASES", "Case", "Result", "play_case"]

#: by name, in the order in which they are run: what comes first others stand on
CASES = named_cases(joining, refusals, steps, versions, attempts, links, leaving)
