"""Hypothesis profile: no deadline on small, noisy machines."""

from hypothesis import HealthCheck, settings

settings.register_profile("loft", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("loft")
