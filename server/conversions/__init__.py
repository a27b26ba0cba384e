"""Bodies of other APIs as chat bodies: pure functions, one module per API."""
