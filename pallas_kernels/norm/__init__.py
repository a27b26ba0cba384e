"""What stands between two projections: an addition and a norm."""
