"""Run commands, each in a fork of a process that has all libraries loaded; print what each took.

In: JSON of jobs, `{"name", "arguments"}`. The first two warm up, so that a measured run loads no
library. Out: a line of JSON for each other job: bytes planned by its dry run, and the highest
resident memory beyond that before the run.
"""

import contextlib
import ctypes
import gc
import io
import json
import os
import sys
from pathlib import Path


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def llmctl(*arguments):
    from llmctl.cli import main

    sys.argv = ["llmctl", *arguments]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as left:
        if left.code:
            sys.exit(err.getvalue())
    return out.getvalue()


def in_a_fork(job):
    """The line of a job; its memory is its own."""
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        os.wait()
        return text
    plan = json.loads(llmctl(*job["arguments"], "--dry-run", "--json"))["plan"]
    tidy()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    llmctl(*job["arguments"])
    line = {
        "name": job["name"],
        "planned": plan["memory"]["peak"],
        "measured": status("VmHWM") - before,
    }
    os.write(writing, json.dumps(line).encode())
    os._exit(0)


def tidy():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    first, second, *jobs = json.loads(sys.argv[1])
    for job in (first, second):
        llmctl(*job["arguments"])
    tidy()
    for job in jobs:
        print(in_a_fork(job), flush=True)
