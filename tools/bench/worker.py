"""Processes of the benchmark: requests and replies as JSON lines over pipes.

Every contestant runs in a process of its own, so that what one leaves behind in memory or breaks on
the GPU does not touch the other. A contestant is an object whose public methods take and return
JSON values. What a worker's libraries print goes to stderr.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from typing import Any

from slideformer.graph.errors import SlideFormerError


class WorkerError(SlideFormerError):
    """A contestant failed; ``out_of_memory`` tells whether for lack of GPU memory."""

    def __init__(self, message: str, *, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class Worker:
    """A contestant in a process of its own.

    ``contestant`` names the class as ``module:name``. The process starts at once; it imports while
    the caller goes on, and the first `ask` waits for it.
    """

    def __init__(self, contestant: str) -> None:
        self.name = contestant.rpartition(":")[2]
        program = "import sys; from slideformer.tools.bench.worker import serve; serve(sys.argv[1])"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, contestant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, method: str, **arguments: Any) -> Any:
        """Call a method and wait for what it returns.

        Raises `WorkerError` if the method raised, or if the process is gone.
        """
        try:
            self._requests.write(json.dumps([method, arguments]) + "\n")
            self._requests.flush()
            line = self._replies.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise WorkerError(
                f"{self.name} ended with code {code} in {method}; see its output above"
            )
        reply = json.loads(line)
        if "error" in reply:
            message = f"{self.name}.{method}: {reply['error']}"
            raise WorkerError(message, out_of_memory=reply["out_of_memory"])
        return reply["value"]

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()


def serve(contestant: str) -> None:
    """Answer requests from stdin until it ends; runs in the worker's process."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, name = contestant.rpartition(":")
    subject: object | None = None
    with contextlib.suppress(Exception):  # the first request tells what is wrong
        importlib.import_module(module)
    try:
        for line in sys.stdin:
            method, arguments = json.loads(line)
            try:
                if subject is None:
                    subject = getattr(importlib.import_module(module), name)()
                reply = {"value": getattr(subject, method)(**arguments)}
            except Exception as error:  # whatever it is, the benchmark goes on with its next row
                reply = _failure(error)
            replies.write(json.dumps(reply) + "\n")
            replies.flush()
    except (KeyboardInterrupt, BrokenPipeError):  # whoever asked has left
        pass
    os._exit(0)  # taking the contestant apart would only take time


def _failure(error: Exception) -> dict[str, Any]:
    """The reply that tells of an error; the traceback of one of ours goes to stderr."""
    import torch

    full = isinstance(error, torch.OutOfMemoryError)
    if not full and not isinstance(error, SlideFormerError):
        sys.excepthook(type(error), error, error.__traceback__)
    text = str(error).strip() or "no message"
    message = text if isinstance(error, SlideFormerError) else f"{type(error).__name__}: {text}"
    # Frames of the traceback hold tensors, which the next request may need the memory of.
    error.__traceback__ = None
    return {"error": message, "out_of_memory": full}
