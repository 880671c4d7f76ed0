"""For every test: how long an example of hypothesis takes is the machine's business, and no fault."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
