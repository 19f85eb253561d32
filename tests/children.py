"""Processes of their own for tests: forks of this one, which has imported everything already."""

import json
import os
import signal

import torch

from spectrim.errors import InputError, NonFiniteError


def child(act):
    """Run `act` in a forked child; returns the wait status and what it reported."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            # Where the suite runs in the background, it was started with interrupts ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # A fork leaves torch's pool to be replaced by whoever asks first; threads that ask
            # together (a loader's) can find none, so it is asked for here.
            torch.set_num_threads(torch.get_num_threads())
            told = json.dumps(act()).encode()
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(told)
            status = 0
        except KeyboardInterrupt:
            status = 130
        except (InputError, OSError, NonFiniteError) as error:
            os.write(writer, json.dumps([type(error).__name__, str(error)]).encode())
            status = 2
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    return os.waitpid(pid, 0)[1], json.loads(said) if said else None
