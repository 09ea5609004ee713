"""Fixtures of the models and adapters."""

CHECKS: dict = {}
