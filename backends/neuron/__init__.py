"""AWS Neuron: graphs in the operations its compiler accepts, their export, and what runs them."""
