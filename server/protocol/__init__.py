"""The bodies that clients send and get: one module per noun, msgspec structs only."""
