"""What a model's text means: thoughts, answers and calls of tools, read as the text comes."""
