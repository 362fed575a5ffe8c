"""A loaded model, wired together, with this machine's costs."""
