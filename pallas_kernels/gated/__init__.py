"""The gated half of a feed-forward block: gate and up projection with the activation between them.
The definition (reference.py), and one file per platform."""
