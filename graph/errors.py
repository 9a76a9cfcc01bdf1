"""Every error that a user of SlideFormer can meet, as one small tree.

    SlideFormerError
    ├── ConfigError            a setting is wrong or unknown
    ├── GraphError             a task graph breaks a rule
    ├── BudgetError            no plan fits the memory budgets
    ├── CheckpointError        a checkpoint or model folder cannot be read or written
    ├── DataError              a training file cannot be read
    ├── UnsupportedModelError  the model's family or a setting of it is not supported
    ├── DeviceError            the requested device is not usable
    ├── StoreError             storage on NVMe failed
    ├── PolicyError            a scheduling policy broke its contract
    ├── TaskError              a task of a running graph failed
    └── NonFiniteError         a gradient or loss is not finite

Messages say what was found, what the limit is and what to try next. ``assert`` is for mistakes of
our own, never for a user's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable


class SlideFormerError(Exception):
    """Base of all errors that are the user's to read; the command line prints them on one line."""


class ConfigError(SlideFormerError):
    """A setting has an unknown name or a value that cannot work."""


class GraphError(SlideFormerError):
    """A task graph breaks a rule; the message names the task or buffer."""


class BudgetError(SlideFormerError):
    """No plan fits the budgets; the message names the least that works."""


class CheckpointError(SlideFormerError):
    """A checkpoint or model folder is missing, incomplete, damaged or not writable."""


class DataError(SlideFormerError):
    """A training file is missing, empty or malformed; the message names file and line."""


class UnsupportedModelError(SlideFormerError):
    """The model's family or one of its settings is not supported."""


class DeviceError(SlideFormerError):
    """The requested device does not exist or cannot be used."""


class StoreError(SlideFormerError):
    """A folder or file on NVMe cannot be used any more; the message names it and the extent."""


class PolicyError(SlideFormerError):
    """A scheduling policy chose outside the ready set, raised, or idled with nothing in flight."""


class TaskError(SlideFormerError):
    """A task failed while its graph ran; the message names the task."""


class NonFiniteError(SlideFormerError):
    """A gradient or a loss is infinite or not a number."""


def task_error(
    task: str, error: BaseException, before: Iterable[tuple[str, int]]
) -> SlideFormerError:
    """What failed ``task``, by name; ``before`` are the last tasks, each with its instance.

    An error of this tree keeps its class, others become a `TaskError`.
    """
    # A subclass of somebody else may have to be made in another way.
    if isinstance(error, SlideFormerError) and type(error).__module__ == __name__:
        named: SlideFormerError = type(error)(f"{task}: {error}")
    else:
        recent = "; ".join(f"{name}#{number} finished" for name, number in before) or "nothing"
        what = f"{type(error).__name__}: {shown(error, str)}"
        named = TaskError(f"{task} failed: {what} (before it: {recent})")
    named.__cause__ = error
    return named


def shown(value: object, form: Callable[[object], str] = repr) -> str:
    """What a user's code gave us as text; ``form`` of it may be the user's, too, and raise."""
    try:
        return form(value)
    except Exception:  # of any type: it is a user's method
        return f"<{type(value).__name__} that cannot be shown>"
