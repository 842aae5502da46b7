"""What surrounds the steps of a training run: options, checkpoints, records, validation, results."""
