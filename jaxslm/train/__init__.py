"""Training: losses, the input pipeline and the loop. Nothing that serves imports it."""
