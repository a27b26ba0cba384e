"""Our own kernels, each beside its plain-jnp reference. Imports nothing else of Octavo."""
