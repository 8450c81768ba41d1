"""Loss to update: optimizer, step, loop."""
