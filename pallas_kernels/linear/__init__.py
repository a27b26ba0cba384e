"""Projections fused with what comes before and after them; one file per platform."""
