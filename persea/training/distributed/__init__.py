"""Several training processes: world, launcher, heartbeat."""
