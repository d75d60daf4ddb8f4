"""The folders of tests/config, for commands."""

from tests.config.conftest import workplace

__all__ = ["workplace"]
