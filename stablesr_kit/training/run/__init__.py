"""Everything around the training steps: options, checkpoints, records, validation, results."""
