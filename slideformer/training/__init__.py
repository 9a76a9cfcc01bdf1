"""What a trainer does beside its loop: reports, checkpoints, validation, resuming, Ctrl-C."""
