"""Compile and plan for hardware that is not here; `octavo.cli.targets` says which module does which."""
