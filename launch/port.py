"""A TCP port of this machine -> where ranks meet some seconds later, when they have started.

One that the system itself picks, for port 0, it gives to the next that asks as well: to a connection of another run,
say, while these ranks still load their libraries. So it is one of those that systems give to nobody who does not name
it, drawn at random, since others draw too.
"""

import random
import socket

from moe.errors import LaunchError

_PORTS = range(20_000, 30_000)
"""Linux gives connections 32768 and above, Kubernetes gives services 30000 and above."""
_TRIES = 100


def free_port(address: str = "") -> int:
    """Nobody has it now; `address`: of the interface, "" for all. Raises `LaunchError` if no port can be found."""
    draw = random.SystemRandom()
    fault = ""
    for _ in range(_TRIES):
        port = draw.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError as error:
                fault = error.strerror or str(error)
                continue
        return port
    raise LaunchError(
        f"none of {_TRIES} ports from {_PORTS[0]} to {_PORTS[-1]} can be taken ({fault}), and ranks must meet at one. "
        f"`ss --tcp --listening` shows who has them."
    )
