"""A pseudo-terminal, which shows what a person sees. Not on Windows, which has none."""

import codecs
import contextlib
import fcntl
import os
import pty
import re
import struct
import termios
import threading


class Terminal:
    """A pseudo-terminal of 80 columns. text: what came out of it so far."""

    def __init__(self):
        self.text = ""
        self._inside, self.outside = pty.openpty()
        fcntl.ioctl(self.outside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        decode = codecs.getincrementaldecoder("utf-8")().decode
        with contextlib.suppress(OSError):  # Linux' word for its end
            while some := os.read(self._inside, 4096):
                self.text += decode(some)

    def shown(self):
        """Its lines, redrawn ones too, without colours and movements of the cursor. Nothing more can be written."""
        os.close(self.outside)
        self._reader.join(10)
        text = re.sub(r"\x1b\[[0-9;?]*[mlh]", "", self.text)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", text).splitlines()

    def left(self):
        """What stands there at the end: no line that was drawn again and again. Nothing more can be written."""
        self.shown()
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text.replace("\r\n", "\n"))
        lines = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]
        lines = [line for line in lines if not re.search("[━╸╺]", line)]
        return re.sub("\n{3,}", "\n\n", "\n".join(lines)).strip("\n").split("\n")
