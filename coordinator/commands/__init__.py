"""The subcommands of `coordctl`, one a file."""
