"""Compares the engine with a baseline, in turn on one machine, and measures the memory of both.

A *turn* is some warm-up steps and some measured ones, a *pair* one turn of each side. Both sides
run in processes of their own. Where both fit the GPU together they stay there; otherwise each gives
its memory back before the other's turn and starts anew in its next. Ours is measured first and
alone until its context's size is known.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slideformer.config import parse_size
from slideformer.graph.serialise import from_json
from slideformer.simulation import GraphTimeline
from slideformer.tools.bench.report import summary
from slideformer.tools.bench.rows import Row, Turns
from slideformer.tools.bench.trace import report as trace_report
from slideformer.tools.bench.worker import Worker, WorkerError
from slideformer.tools.host_memory import HostPeak
from slideformer.traces import GRAPH_FILE, TRACE_FILE, from_chrome

logger = logging.getLogger(__name__)

_FLOOR_SIZES = {
    "cuda": {"update_numel": 1 << 28, "copy_nbytes": 128 << 20},
    "cpu": {"update_numel": 1 << 20, "copy_nbytes": 1 << 20},
}
"""Parameters of the measured update and bytes of the measured copies, per device."""

_ROOM = 1 << 30
"""Bytes of the GPU that must stay free for two contestants to share it."""


def measure(
    row: Row, turns: Turns, device: str, *, floors: bool = False, trace: Path | None = None
) -> dict[str, Any]:
    """Measure one row; one that fails says why, and the next goes on.

    ``trace`` is a folder for the graph of a step and when each task of the last steps ran.
    """
    comparison = Comparison(row, turns, device, trace)
    result = comparison.result
    try:
        try:
            comparison.run()
        finally:
            comparison.close()
        if trace is not None:
            result["trace_report"] = trace_report(_read_trace(trace), turns.steps)
        if floors:
            result["floors"] = measure_floors(result)
    except WorkerError as error:
        logger.error("%s: %s", row.label, error)
        result["error"] = str(error)
    result["summary"] = summary(result)
    return result


class Comparison:
    """One row being measured; close it in the end, whatever happened."""

    def __init__(self, row: Row, turns: Turns, device: str, trace: Path | None) -> None:
        self.row = row
        self._turns = turns
        self._device = device
        self._trace = trace
        self._together = True
        self._ours = Worker("slideformer.tools.bench.ours:Ours")
        self._baseline: Worker | None = None
        if row.baseline != "none":
            self._baseline = Worker("slideformer.tools.bench.baseline:Baseline")
        self.result: dict[str, Any] = {"row": row.model_dump()}

    def run(self) -> dict[str, Any]:
        """Measure everything; raises `WorkerError`. What was found so far stays in ``result``."""
        cap = self.row.gpu_cap
        ours, result = self._ours, self.result
        hello = ours.ask("hello", device=self._device, gpu_cap=parse_size(cap) if cap else None)
        self._device, result["gpu"] = hello["device"], hello["gpu"]
        result["device"] = self._device
        host = HostPeak(ours.pid)
        try:
            result["engine"] = self._build_ours()
            first = ours.ask("run", steps=1, warmup=self._turns.warmup)
            if "used" in first:
                result["gpu_context"] = first["used"] - first["reserved"]
            if self._baseline is not None:
                self._prepare_baseline(self._baseline)
            self._take_turns()
            host.sample()
        finally:
            host.close()
            result["host_peak"], result["host_samples"] = host.peak, host.samples
            result["host_kind"] = host.kind
        return result

    def close(self) -> None:
        """End both processes."""
        for worker in (self._ours, self._baseline):
            if worker is not None:
                worker.close()

    def _build_ours(self) -> dict[str, Any]:
        built: dict[str, Any] = self._ours.ask(
            "build",
            shape=self.row.shape,
            settings=self.row.engine_settings(),
            phantom=self.row.phantom,
        )
        return built

    def _prepare_baseline(self, baseline: Worker) -> None:
        """Start it up beside ours; where that does not fit, let the two give way to each other."""
        row = self.row
        hello = baseline.ask("hello", device=self._device)
        baseline.ask(
            "prepare",
            recipe=row.baseline,
            shape=row.shape,
            batch_size=row.step_rows,
            seq_len=row.seq_len,
            micro_rows=self.result["engine"]["plan"]["micro_rows"],
            lora=row.settings.get("lora"),
        )
        self.result["liger"] = hello["liger"]
        self.result["baseline_kernels"] = "Liger" if hello["liger"] else "plain transformers"
        try:
            found = baseline.ask("run", steps=1, warmup=self._turns.warmup)
            self._together = not found.get("retries") and _room(found) >= _ROOM
        except WorkerError as error:
            if not error.out_of_memory:
                raise
            self._together = False
        if not self._together:
            logger.info("%s: the two do not fit the GPU together; they take turns", row.label)
            baseline.ask("release")

    def _take_turns(self) -> None:
        turns = {"steps": self._turns.steps, "warmup": self._turns.warmup}
        ours: list[dict[str, Any]] = []
        theirs: list[dict[str, Any]] = []
        self.result["sharing"] = "together" if self._together else "in turn, each rebuilt"
        self.result["ours"], self.result["theirs"] = ours, theirs
        for pair in range(self._turns.pairs):
            if not self._together and pair > 0:
                self._build_ours()
            ours.append(self._ours.ask("run", **turns))
            self._note(pair, "ours", ours[-1])
            if self._trace is not None and pair == self._turns.pairs - 1:
                self._ours.ask("trace", folder=str(self._trace.absolute()))
            if self._baseline is None:
                continue
            if not self._together:
                self._ours.ask("release")
            theirs.append(self._baseline.ask("run", **turns))
            self._note(pair, self.row.baseline, theirs[-1])
            if not self._together:
                self._baseline.ask("release")

    def _note(self, pair: int, side: str, turn: Mapping[str, Any]) -> None:
        rate = self.row.step_rows * self.row.seq_len / turn["step_seconds"]
        logger.info("%s, pair %d: %s %.0f tokens/s", self.row.label, pair + 1, side, rate)


def _read_trace(folder: Path) -> GraphTimeline:
    """When the tasks of the last steps ran."""
    graph = from_json((folder / GRAPH_FILE).read_bytes())
    return GraphTimeline(from_chrome((folder / TRACE_FILE).read_bytes()).spans, graph=graph)


def _room(found: Mapping[str, Any]) -> float:
    """Bytes of the GPU that nobody uses; no end of them where there is none."""
    return float(found["total"] - found["used"]) if "total" in found else float("inf")


def measure_floors(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the machine could do at best for a row that was measured. Raises `WorkerError`."""
    row, engine = Row.model_validate(result["row"]), result["engine"]
    plan = engine["plan"]
    worker = Worker("slideformer.tools.bench.floors:Floors")
    try:
        found: dict[str, Any] = worker.ask(
            "measure",
            device=result["device"],
            shape=row.shape,
            sizes={
                "rows": row.step_rows,
                "seq_len": row.seq_len,
                **{name: plan[name] for name in ("micro_rows", "head_tile", "compute", "kept")},
            },
            traffic=engine["traffic"],
            threads=row.settings.get("threads"),
            steps=3,
            **_FLOOR_SIZES[result["device"]],
        )
    finally:
        worker.close()
    return found
