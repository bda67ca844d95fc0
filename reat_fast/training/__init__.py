"""A training run around the step: plan, folder, progress, selection, and what to do on faults."""
