"""Running agents: the compiled loop, the host driver, checkpoints, logs and devices."""
