"""Compile and plan for hardware that is not here; octavo/cli/targets.py knows who does what."""
