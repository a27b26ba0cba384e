"""The HTTP endpoint. Never imports jax."""
