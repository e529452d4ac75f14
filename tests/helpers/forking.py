"""Programs that fork, in a process of their own, with an end to every wait."""

import subprocess
import sys

_HEAD = """
import gc, multiprocessing, os, signal, sys, threading, time
from pysteer import Engine, SteeredLlama, SteeringError
path = sys.argv[1]

def held(lock):
    "Hold a lock in another thread, for ever."
    taken = threading.Event()
    def hold():
        with lock:
            taken.set()
            time.sleep(3600)
    threading.Thread(target=hold, daemon=True).start()
    assert taken.wait(30)

def refused(what):
    try:
        what()
    except SteeringError as error:
        assert "forked" in str(error), error
    else:
        raise AssertionError("not refused")

def in_child(work):
    "Return the exit status of work in a forked process; 14: it hung."
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        work()
        gc.collect()
        sys.exit(0)  # with all that the interpreter does at its end
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def forking(path, program):
    """Return the standard output of a program for a model; fail unless it ends well."""
    done = subprocess.run(
        [sys.executable, "-c", _HEAD + program, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
