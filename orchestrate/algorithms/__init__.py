"""Policy-gradient algorithms as pure functions."""
