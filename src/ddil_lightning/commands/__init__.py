"""The command line, a file each. Nothing is imported here, so that `--version` costs nothing."""
