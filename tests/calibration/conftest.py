"""Hypothesis without deadlines: the machines that run these tests are busy, and speed is not the claim."""

from hypothesis import HealthCheck, settings

settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")
