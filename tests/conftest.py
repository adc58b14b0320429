"""What holds for every test."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Started in the background of a shell: commands that the tests stop by SIGINT would inherit that nobody listens to it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
