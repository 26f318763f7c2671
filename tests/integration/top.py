"""Drives `stoke top` in a terminal: top.py BINARY CLUSTER JOB. Waits for what is drawn, and ends with its exit code."""

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time

LIMIT_S = 60

binary, cluster, job = sys.argv[1:]
pid, terminal = pty.fork()
if pid == 0:
    os.execve(binary, [binary, "--cluster", cluster, "top"], {**os.environ, "TERM": "xterm-256color"})
drawn, width = b"", 120


def resize() -> None:
    global width
    # Another one each time: twice between two pictures must not be the old one.
    width = 120 + (width - 119) % 20
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))


resize()


def until(words: bytes) -> None:
    """Reads until this was drawn since the last key."""
    global drawn
    deadline = time.monotonic() + LIMIT_S
    # Cells are drawn one by one, with movements (also over what is blank) and colours in between.
    while words.replace(b" ", b"") not in re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]| ", b"", drawn):
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            sys.exit(f"{words!r} was not drawn: {drawn[-4000:]!r}")
        if select.select([terminal], [], [], 0.4)[0]:
            drawn += os.read(terminal, 65536)
        else:
            # Only cells that differ from the picture before are drawn, unless the terminal has another size.
            resize()


def press(keys: bytes) -> None:
    global drawn
    drawn = b""
    os.write(terminal, keys)


until(job.encode())
press(b"?")
until(b"shift-tab")
press(b"\x7f")
press(b"\r")
until(b"world sizes")
press(b"\x7f")
until(b"Events")
press(b"\t\x1b[B")
press(b"q")
while True:
    try:
        if not os.read(terminal, 65536):
            break
    except OSError:  # The other side is closed.
        break
_, status = os.waitpid(pid, 0)
sys.exit(os.waitstatus_to_exitcode(status))
