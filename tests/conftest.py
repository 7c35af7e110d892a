"""What holds for all tests: workers' environment, and no deadline for Hypothesis on a machine that is slow now and then."""

import os

from hypothesis import settings

from flashtalk_cli.launch import ENVIRONMENT

os.environ.setdefault("MKL_CBWR", ENVIRONMENT["MKL_CBWR"])  # read when torch is first asked for a product

settings.register_profile("searching", deadline=None)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "searching"))
