"""The engine: a model, its host state, its graphs, and a scheduler that runs them.

    with Engine(EngineConfig(model="llama", batch_size=16)) as engine:
        for batch in batches:
            handle = engine.step(batch)
        print(handle.loss())
        engine.save("tuned")

Reading a handle waits for it; not reading lets steps overlap. This module wires the folders
together and decides nothing: placement is the planner's, order the policy's.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PretrainedConfig

from slideformer.checkpoint_info import CheckpointInfo
from slideformer.checkpointing import Checkpoint, PendingCheckpoint
from slideformer.config import EngineConfig
from slideformer.determinism import Determinism
from slideformer.devices import make_lanes
from slideformer.filling import fill
from slideformer.graph.errors import CheckpointError, ConfigError, SlideFormerError
from slideformer.graph.graph import TaskGraph
from slideformer.graph.plan import Budgets, Compute, MemoryPlan, Optimizer
from slideformer.handles import StepHandle
from slideformer.memory.planner import plan_graphs
from slideformer.models.adapter_files import weights_writer
from slideformer.models.bindings import model_bindings
from slideformer.models.clip_ops import ClipOps
from slideformer.models.context import SaveContext, StepContext, StepResults, UsedRows
from slideformer.models.data.batches import Batch
from slideformer.models.export import Records, small_files
from slideformer.models.families import decoder_config, read_model_config
from slideformer.models.layouts import fill_constants
from slideformer.models.model_memory import ModelMemory
from slideformer.models.rotary import rope_tables
from slideformer.models.stored_weights import check_weights, weights_digest
from slideformer.numerics import numerics_of
from slideformer.optimizers import optimizer_step
from slideformer.phantom import phantom_budgets, phantom_layers, real_part, shared_places
from slideformer.planning import plan_for, spec_for
from slideformer.run_memory import RunMemory
from slideformer.runtime.device import bind
from slideformer.runtime.loop import SchedulerThread
from slideformer.runtime.policies import Policy, make_policy
from slideformer.runtime.trace import Timeline, Trace
from slideformer.this_machine import budgets_for, device_for, profile_for, threads_for

logger = logging.getLogger(__name__)

MAX_OPEN_STEPS = 2
"""Steps submitted and not finished: one runs, one is ready to follow without a gap."""

_TRAIN, _EVALUATE, _SAVE, _CHECKPOINT = range(4)
"""Which of the graphs that `plan_graphs` makes does what."""


class Engine:
    """Fine-tunes one model; use as a context manager, or `close` it.

    ``initial`` replaces the model folder by random weights of that shape (for benchmarks), and
    ``phantom`` backs the state of most layers by that of others (``phantom.py``). ``policy``
    replaces the one that ``config`` names. With ``checkpoint`` it goes on from there and keeps its
    numerics. ``on_plan`` is called with the plan and its budgets before anything large is
    allocated; what it raises ends the construction.

    Raises `BudgetError`, `CheckpointError`, `ConfigError`, `DeviceError`, `UnsupportedModelError`
    before anything large is allocated.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        initial: PretrainedConfig | None = None,
        phantom: bool = False,
        policy: Policy | None = None,
        checkpoint: Checkpoint | None = None,
        on_plan: Callable[[MemoryPlan, Budgets], None] | None = None,
    ) -> None:
        self.config = config
        self._hf_config = initial or read_model_config(config.model)
        self._files = small_files(config.model)  # now, as the folder may not outlive the run
        self.spec = spec_for(self._hf_config, config)
        if checkpoint is not None:
            checkpoint.check_model(self.spec, Optimizer(config.optimizer))
            checkpoint.check_config(self._hf_config)
        self._base_weights = ""
        if initial is None and self.spec.lora is not None:
            self._base_weights = weights_digest(config.model, self.spec)
            if checkpoint is not None:
                checkpoint.check_base(self._base_weights, config.model)
        elif initial is None and checkpoint is None:
            check_weights(config.model, self.spec)
        self._decoder = decoder_config(self._hf_config)
        self._device = device_for(config)
        self._policy = policy or make_policy(config.policy)
        self._profile = profile_for(self._device, config.nvme)
        budgets = budgets_for(config, self._device, here=not phantom)
        kept = checkpoint.info.numerics if checkpoint else {}
        if phantom:
            kinds = Compute(config.compute), Optimizer(config.optimizer)
            budgets = phantom_budgets(self.spec, budgets, *kinds)
        self.plan = plan_for(self._hf_config, config, budgets, self._profile, kept)
        layers = phantom_layers(self.spec, self.plan) if phantom else {}
        if on_plan is not None:
            on_plan(self.plan, budgets)
        self._steps = checkpoint.info.step if checkpoint else 0
        self._skipped = checkpoint.info.skipped if checkpoint else 0
        self._open: deque[Future[None]] = deque()
        self._saving: deque[Future[None]] = deque()  # checkpoints, which steps need not wait for
        self._failed: BaseException | None = None
        self._closed = False
        self._graphs = plan_graphs(self.spec, self.plan)
        self._memory = RunMemory(
            self.spec,
            self.plan,
            self._graphs,
            self._device,
            config.nvme,
            checksums=config.nvme_checksums,
            shared=shared_places(layers),
        )
        self._determinism = Determinism(config.deterministic)
        try:
            self._stored = fill(
                self._memory, real_part(self.spec, layers), config.model, initial, checkpoint
            )
            self._memory.arenas.ready()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # from here on every stream sees the weights
                torch.cuda.empty_cache()  # what filling took lies where no other stream takes it
            self._start()
        except BaseException:
            self._determinism.restore()
            self._memory.close()
            raise

    # -- making ready ----------------------------------------------------------------------------

    def _start(self) -> None:
        config = self.config
        memory = ModelMemory(self.spec, self._decoder, self.plan, self._memory.states)
        threads = threads_for(config)
        self._clip = ClipOps(
            memory, config.max_grad_norm, skip=config.skip_nonfinite, skipped=self._skipped
        )
        shape = config.label_smoothing, config.z_loss
        bindings = model_bindings(memory, threads, self._clip, *shape) | self._memory.bindings()
        step = self._graphs[_TRAIN]
        constants = {
            name: self._memory.view(buffer)
            for name, buffer in step.buffers.items()
            if name == "rope" or name.startswith("mask.")
        }
        ropes = [
            rope_tables(self._hf_config, config.seq_len, self._device, kind)
            for kind in self._decoder.rope_kinds
        ]
        fill_constants(constants, memory, ropes)
        self._operations = [bind(graph, bindings, self._memory) for graph in self._graphs]
        self._trace = Trace()
        self._scheduler = SchedulerThread(
            make_lanes(self._device, self.plan.workspace),
            self._policy,
            self._profile,
            self._trace,
        )

    # -- running ---------------------------------------------------------------------------------

    def step(self, batch: Batch, *, lr: float | None = None) -> StepHandle:
        """Train on a batch; returns before it is done, unless two steps are open already.

        ``lr`` replaces the configured learning rate for this step. Raises what failed an earlier
        step; `DataError` for a batch that does not fit or has no target, `ConfigError` for a rate
        that cannot work: then it is no step.
        """
        config = self.config
        if lr is not None and not (math.isfinite(lr) and lr >= 0):
            raise ConfigError(f"lr is {lr} for this step; give a finite number, 0 or more")
        batch.check((config.step_rows, config.seq_len), self.spec.vocab, packed=self.plan.packed)
        optimizer = optimizer_step(config, lr, self._steps + 1)
        ids = batch.input_ids.reshape(-1)
        used = UsedRows.of(ids, self.spec.vocab, self._decoder.padding_idx)
        context = StepContext.of(batch, self.plan, StepResults(), used, optimizer)
        handle = self._run(_TRAIN, self._steps + 1, batch, context)
        self._steps += 1
        return handle

    def evaluate(self, batch: Batch) -> StepHandle:
        """Compute the loss of a batch with the weights after all submitted steps; trains nothing.

        Raises as `step` does.
        """
        config = self.config
        batch.check((config.step_rows, config.seq_len), self.spec.vocab, packed=self.plan.packed)
        results = StepResults()
        results.gradient_norm.set_exception(
            SlideFormerError("an evaluation has no gradients and so no norm; read its loss")
        )
        context = StepContext.of(batch, self.plan, results)
        return self._run(_EVALUATE, self._steps, batch, context)

    def _run(self, graph: int, number: int, batch: Batch, context: StepContext) -> StepHandle:
        results = context.results
        done = self._submit(graph, context)

        def pass_on(ended: Future[None]) -> None:
            error = ended.exception()
            if error is not None:
                results.fail(error)

        done.add_done_callback(pass_on)
        return StepHandle(number, batch.target_tokens, batch.real_tokens, results, done)

    def _submit(self, graph: int, context: Any) -> Future[None]:
        queue = self._saving if graph == _CHECKPOINT else self._open
        while queue and (len(queue) >= MAX_OPEN_STEPS or queue[0].done()):
            self._wait_oldest(queue)
        if self._failed is not None:
            raise self._failed
        self._check_open()
        done = self._scheduler.submit(self._graphs[graph], self._operations[graph], context)
        queue.append(done)
        return done

    def _check_open(self) -> None:
        if self._closed:
            raise SlideFormerError("the engine is closed; make a new one to go on")

    def _wait_oldest(self, queue: deque[Future[None]]) -> None:
        try:
            queue[0].result()
        except SlideFormerError as error:
            self._failed = self._failed or error
        queue.popleft()  # not if Ctrl-C ended the wait

    def synchronize(self) -> None:
        """Wait until everything submitted is done; raises what failed."""
        for queue in (self._open, self._saving):
            while queue:
                self._wait_oldest(queue)
        if self._failed is not None:
            raise self._failed

    def timeline(self) -> Timeline:
        """When each task of the last steps ran."""
        return self._trace.timeline()

    @property
    def graph(self) -> TaskGraph:
        """The graph of a training step."""
        return self._graphs[_TRAIN]

    @property
    def steps(self) -> int:
        """How many steps were submitted, those before the checkpoint it began from included."""
        return self._steps

    @property
    def numerics(self) -> dict[str, str | int]:
        """What decides the rounding: to compare if two runs of one config differ in bits."""
        return numerics_of(self.plan, self._device)

    def checkpoint(self, output: Path | str) -> PendingCheckpoint:
        """Begin to write all state after the submitted steps, to go on from; training may go on.

        Each part is written before the step behind it may change it. `PendingCheckpoint.finish`
        waits for that and makes the folder appear at ``output``, in place of what lies there. If
        it cannot be written the run can go on. Raises `CheckpointError` if there is no room, and
        what failed an earlier step.
        """
        base = self.config.model, self._base_weights
        info = CheckpointInfo.of(
            self._steps, self.spec, self.plan, self.numerics, self._stored, *base
        )
        skipped = partial(self._clip.skipped, info.step)
        pending = PendingCheckpoint(Path(output), self.spec, info, self._files, skipped)
        try:
            pending.started(self._submit(_CHECKPOINT, pending.context))
        except BaseException:
            pending.abort()
            raise
        return pending

    def save(self, output: Path | str, records: Records = dict, *, replace: bool = False) -> Path:
        """Write a model folder of all submitted steps, one for PEFT where it is of adapters.

        It appears whole or not at all, with what ``records`` gives in the end as further files, by
        name, and with ``replace`` in place of a folder there, whose other files stay. Returns
        where it lies: at ``output``, or beside what came to lie there. Raises `CheckpointError` if
        it cannot be written, after which the run can go on, and after a failed step, of which no
        part is saved.
        """
        self._check_open()
        masters = self._memory.saved_masters()
        with weights_writer(
            self.config.model, Path(output), self.spec, masters, self._stored,
            replace=replace, files=self._files,
        ) as writer:  # fmt: skip
            saving = SaveContext(writer)
            try:
                self._submit(_SAVE, saving)
                self.synchronize()
            except SlideFormerError as error:
                raise CheckpointError(
                    "a step failed, so the weights in memory are part old and part new and are not "
                    f"saved; restart from {self.config.model}. The failure: {error}"
                ) from error
            if saving.errors:
                raise saving.errors[0]
            return writer.finish(records())

    def close(self) -> None:
        """Wait for what is in flight and give all memory back, whoever still holds the engine."""
        self._closed = True
        self._scheduler.close()
        self._determinism.restore()
        self._operations = []  # they hold views of the memory
        self._memory.close()
        if self._device.type == "cuda":
            # The next engine plans with what the driver calls free. After a kernel that failed all
            # calls fail, which a task's error has told.
            with suppress(RuntimeError):
                torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
