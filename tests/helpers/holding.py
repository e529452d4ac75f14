"""Requests that hold an engine at a known point, so that no test depends on the time it takes."""

import threading


class Steps:
    """A stopping criterion that holds the scheduler before each token of a request."""

    def __init__(self):
        self._reached, self._allowed = threading.Semaphore(0), threading.Semaphore(0)
        self._free = False

    def __call__(self, tokens, logits):
        if not self._free:
            self._reached.release()
            assert self._allowed.acquire(timeout=60)
        return False

    def wait(self):
        """Wait until the scheduler holds."""
        assert self._reached.acquire(timeout=60)

    def step(self):
        """Let one token through, and wait until the scheduler holds before the next."""
        self._allowed.release()
        self.wait()

    def go_on(self):
        self._free = True
        self._allowed.release()
