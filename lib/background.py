"""Work that somebody watches: the steps of a function that runs in a thread, and sample.py as a process.

Both are generators. Whoever watches may stop: when the generator is closed, the work ends.
"""
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path

from lib.console import UserError

SAMPLE = Path(__file__).resolve().parent.parent / "sample.py"
END = object()


class Closed(Exception):
    """Nobody takes what the work pushes any more."""


def streamed(work):
    """Call work(push) in a thread, and yield what it pushes. When this is closed, the next push ends the work."""
    pushed = queue.Queue()
    closed = threading.Event()

    def push(thing):
        if closed.is_set():
            raise Closed
        pushed.put(thing)

    def run():
        try:
            work(push)
            pushed.put(END)
        except Closed:
            pass
        except BaseException as e:
            pushed.put(e)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (thing := pushed.get()) is not END:
            if isinstance(thing, BaseException):
                raise thing
            yield thing
    finally:
        closed.set()
        thread.join()                                                       # so that the next work has the machine


def run_sample(command, flags):
    """Run `sample.py COMMAND`; yield (share of the work that is done, lines that it has printed) while it runs.

    flags: {name: value}; True is a flag without a value, and flags whose value is None, False or empty are left out.
    Raises UserError with the line that the command printed last if it failed.
    """
    words = [sys.executable, SAMPLE, command]
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value:
            words += [f"--{name}", value]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    share = 0.0
    lines = []
    try:
        yield share, lines
        for line in process.stdout:                                         # progress bars end their lines with \r
            if percent := re.match(r".*?(\d+)%\|", line):
                share = int(percent[1]) / 100
            elif line.strip():
                lines.append(line.strip())
            yield share, lines
        process.wait()
    finally:
        process.kill()                                                      # does nothing if it has ended
        process.wait()
    if process.returncode:
        last = lines[-1] if lines else f"{command} ended with code {process.returncode}"
        raise UserError(last.removeprefix("error: "))
