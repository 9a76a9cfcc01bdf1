"""Shows a training run: the plan, then a progress bar, or plain lines where nobody watches.

A bar where stderr is a terminal; otherwise one log line every ``log_every`` steps. Memory is what
the process uses now: on the GPU allocated and reserved, on the host PSS, on NVMe its files.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from slideformer.config import format_size
from slideformer.graph.buffers import Tier
from slideformer.graph.products import model_flops
from slideformer.profiles import cached_machine
from slideformer.this_machine import device_for
from slideformer.tools.host_memory import process_bytes
from slideformer.tools.plan_report import print_plan
from slideformer.tools.smoothing import Smoothed
from slideformer.training.reports import RunStart, StepMetrics

logger = logging.getLogger(__name__)

_SPEED_STEPS = 20
"""Steps over which the speed shown is averaged."""

_HOST_INTERVAL = 2.0
_HOST_SHARE = 0.01
"""Most of the time that may go into reading PSS: the kernel walks all page tables for it."""


class ConsoleProgress:
    """Prints progress to a console; a `slideformer.training.reports.Progress`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._every = 1
        self._steps = 0
        self._skipped = 0
        self._loss = Smoothed()
        self._recent: deque[StepMetrics] = deque(maxlen=_SPEED_STEPS)
        self._peak = 0.0
        self._memory = _Memory()

    def start(self, run: RunStart) -> None:
        """Print the plan, and show the bar if someone watches."""
        machine = cached_machine(device_for(run.config).type)
        print_plan(self._console, run.config, run.spec, run.plan, run.budgets, machine)
        if run.config.device == "cpu" or not torch.cuda.is_available():
            self._console.print("No GPU is used: what is planned for it lies in host memory, too.")
        self._every, self._steps = run.config.log_every, run.steps
        if machine is not None:
            self._peak = machine.profile.flops / model_flops(run.spec, run.config.seq_len)
        self._memory.nvme = run.plan.peaks.get(Tier.NVME, 0)
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                # Wraps where the terminal is narrow.
                TextColumn("{task.fields[values]}", table_column=Column()),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(
                "step", total=run.steps, completed=run.done, values="loading the weights"
            )
            self._bar.start()

    def step(self, metrics: StepMetrics) -> None:
        """Show a step's figures."""
        smoothed = self._loss.add(metrics.loss)
        self._skipped += metrics.skipped
        # The first step warms up: its time says nothing about the next ones.
        if metrics.step > 1 or self._steps == 1:
            self._recent.append(metrics)
        values = [
            f"loss {metrics.loss:.3f} ({smoothed:.3f})",
            f"norm {metrics.gradient_norm:.3g}",
            *([f"{self._skipped} skipped"] if self._skipped else []),
            f"lr {metrics.lr:.3g}",
            self._speed(),
            self._memory.text(),
        ]
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics.step, values="  ".join(values))
        elif metrics.step % self._every == 0 or metrics.step == self._steps:
            values.append(f"{self._remaining(metrics.step)} left")
            logger.info("step %d/%d  %s", metrics.step, self._steps, "  ".join(values))
        if metrics.validation_loss is not None:
            logger.info(
                "step %d/%d  validation loss %.4f, perplexity %.4g",
                metrics.step, self._steps, metrics.validation_loss, metrics.validation_perplexity,
            )  # fmt: skip

    def finish(self) -> None:
        """Leave the bar as it is; further calls do nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _speed(self) -> str:
        """Tokens per second, and as a share of what the machine was measured to compute."""
        seconds = sum(m.seconds for m in self._recent)
        if not seconds:
            return "– tokens/s"
        speed = sum(m.tokens for m in self._recent) / seconds
        share = f" ({speed / self._peak:.0%} of peak)" if self._peak else ""
        return f"{speed:,.0f} tokens/s{share}"

    def _remaining(self, step: int) -> str:
        if not self._recent:
            return "?"
        pace = sum(m.seconds for m in self._recent) / len(self._recent)
        minutes, seconds = divmod(round(pace * (self._steps - step)), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class _Memory:
    """The memory in use, in a few words; the host's is read as seldom as its cost demands."""

    def __init__(self) -> None:
        self.nvme = 0
        self._host = ""
        self._next = 0.0

    def text(self) -> str:
        """What the process uses on the GPU and on NVMe, if it does, and on the host."""
        now = time.perf_counter()
        if now >= self._next:
            try:
                self._host = f"host {format_size(process_bytes(os.getpid()))}"
            except OSError:  # not told here; the rest is worth showing all the same
                self._host = ""
            took = time.perf_counter() - now
            self._next = now + max(_HOST_INTERVAL, took / _HOST_SHARE)
        nvme = f"nvme {format_size(self.nvme)}" if self.nvme else ""
        return "  ".join(part for part in (_gpu_text(), self._host, nvme) if part)


def _gpu_text() -> str:
    if not torch.cuda.is_initialized():
        return ""
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    return f"gpu {format_size(allocated)} of {format_size(reserved)} reserved"
