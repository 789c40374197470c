"""A program on a terminal of its own, in which keys can be pressed."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import termios

from tests.helpers.places import environment

CTRL_C = b"\x03"


def _as_a_shell_does():
    """Take the terminal, and let Ctrl-C end the program: what is started in the background ignores it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A Python program whose input and output are a terminal, 200 characters wide; to be used in a ``with``."""

    def __init__(self, *arguments, cwd):
        self.screen, inner = os.openpty()
        termios.tcsetwinsize(inner, (50, 200))
        self.shown = b""
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            cwd=cwd,
            env=environment(TERM="xterm", CUDA_VISIBLE_DEVICES=""),
            start_new_session=True,
            preexec_fn=_as_a_shell_does,  # noqa: PLW1509 (nothing else can give it a terminal whose keys are its own)
        )
        os.close(inner)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.screen)

    @property
    def text(self):
        """All that was shown so far, without colours and moves of the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.shown.decode(errors="replace")).replace("\r", "\n")

    def _read(self):
        try:
            more = os.read(self.screen, 1 << 16)
        except OSError:  # nobody has the other side any more
            more = b""
        self.shown += more
        return bool(more)

    def wait_for(self, pattern):
        """Read until a regular expression is found in what was shown."""
        while not re.search(pattern, self.text):
            assert self._read(), self.text

    def press(self, key):
        os.write(self.screen, key)

    def end(self):
        """Read to the end; returns the exit code."""
        while self._read():
            pass
        return self.process.wait()
