"""One file per model family. Imports nothing else of Octavo."""
