"""One record per hardware. Nothing outside this folder asks which hardware this is."""
