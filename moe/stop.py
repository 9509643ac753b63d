"""Signals -> a request that the training loop sees at its next step."""

import signal
from types import FrameType


class StopSignal:
    """Whether someone asked this process to stop; the loop saves at the next step and leaves."""

    def __init__(self) -> None:
        self.received = False

    @classmethod
    def listen(cls) -> "StopSignal":
        """SIGTERM and SIGINT are requests from now on; a second SIGINT interrupts at once."""
        stop = cls()
        signal.signal(signal.SIGTERM, stop._receive)
        signal.signal(signal.SIGINT, stop._receive)
        return stop

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
