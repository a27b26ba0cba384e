"""Where weights come from: one file per kind of source. Never imports jax, except `orbax`."""
