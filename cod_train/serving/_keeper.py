"""Runs a model server and ends it when the process that started it is gone, however that ended.

    python -I -S _keeper.py PARENT_PID COMMAND...

A model server must not outlive its starter, kill -9 included, and neither must the processes that it starts itself. So
the keeper leads a process group of its own, in which they all are, and looks twice a second whether its parent still is
the one that started it; this works alike wherever there are process groups. It imports nothing that is not in Python.
"""

import os
import signal
import subprocess
import sys
import threading
import time

LOOK = 0.5
"""Seconds between two looks."""
GRACE = 3.0
"""Seconds an orphaned server gets to end by itself."""


def main() -> int:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    # A handler, not SIG_IGN, which the server would inherit. What comes before there is a server ends it right after.
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    server = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    if asked:
        server.terminate()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        server.terminate()
        time.sleep(GRACE)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = server.wait()
    if os.getppid() != parent:
        os.killpg(0, signal.SIGKILL)  # nobody else is there to end what the server has left behind
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
