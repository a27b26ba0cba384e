"""One handler a route: parse, submit, answer."""
