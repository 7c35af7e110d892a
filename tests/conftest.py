"""What holds for all tests: Hypothesis sets no deadline for an example, for a busy machine is slow now and then."""

from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
