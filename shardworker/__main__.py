"""`python -m shardworker`."""

from shardworker.cli import main

main()
