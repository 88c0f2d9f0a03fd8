"""A run's page: figures, tables and incidents drawn from its events."""
