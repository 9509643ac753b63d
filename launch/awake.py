"""A clock of seconds in which this process was let run: it stands still while a scheduler has suspended the job."""

import time
from dataclasses import dataclass, field

_LONGEST_SECONDS = 2.0


@dataclass
class Awake:
    """For who looks at it many times a second.

    Slurm suspends a job, for another that shares its nodes, by SIGSTOP to all its processes, and lets them go on one
    node after another. Nobody has been silent then, and no rank hangs. A longer time between two looks is taken for
    `_LONGEST_SECONDS`.
    """

    passed: float = 0.0
    last: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Since it was made."""
        now = time.monotonic()
        self.passed += min(now - self.last, _LONGEST_SECONDS)
        self.last = now
        return self.passed
