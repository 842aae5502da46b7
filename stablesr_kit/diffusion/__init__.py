"""Schedules and guidance: they know no network."""
