"""Parts of the trainer: the loop, reports, checkpoints, validation, resuming, Ctrl-C."""
