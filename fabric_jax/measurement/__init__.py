"""Memory, time and device facts."""
