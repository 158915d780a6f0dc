"""Training: networks and data by name, the training loop, checkpoints that survive anything."""
