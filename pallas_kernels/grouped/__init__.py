"""Grouped matmul: each row meets the matrix of its expert. The definition (reference.py), how rows
are cut into tiles (tiles.py), and one file per platform."""
