"""What holds for all tests: Hypothesis sets no deadline for an example, for a busy machine is slow now and then."""

import os

from hypothesis import settings

settings.register_profile("searching", deadline=None)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "searching"))
