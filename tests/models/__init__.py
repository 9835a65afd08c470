"""Models that tests stage, small and of every kind."""
