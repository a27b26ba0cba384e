"""SamplingParams: what a request asks of sampling; names, defaults and errors of the field."""
