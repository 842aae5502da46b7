"""Networks: they know no file, no sampler and no task."""
