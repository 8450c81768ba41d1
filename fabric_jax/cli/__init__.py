"""The ``fabric-jax`` command, one file a subcommand."""
