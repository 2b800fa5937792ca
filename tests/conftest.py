import os
import signal

import hypothesis

# Slow machines are no defects, and a run in CI must be repeatable.
hypothesis.settings.register_profile("guard", deadline=None, derandomize=os.environ.get("CI") == "true")
hypothesis.settings.load_profile("guard")

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
# A shell lets its background jobs ignore it, and what they start; tests send it to both.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Settings of the person who runs the tests; those of the data's place stay.
for name in [name for name in os.environ if name.startswith("GUARD_") and name != "GUARD_DATA"]:
    del os.environ[name]
