"""The project's own fuzzer: python -m tests.fuzz --minutes 60 | --from N --count M | --only N | --shrink N | --read
"Configuration(…)"

A draw is a `Configuration`, a function of its number alone (draw.py): names out of tables (sources, models, optimizers,
callbacks, spreads, fits, interruptions, between), which hold Python source, so that what runs (learner_source.py) is
what a failure's script shows. Each draw is for one of the checks (checks.py), which runs lives of process groups on
forked ranks (lives.py) and compares what they leave (compare.py). A line in a table is all that a new callback, source
or algorithm needs; test_tables.py fails where it is missing. What the library refuses is in refusals.py, with the
reason; any other error is a failure. What was mended goes to regressions.py.
"""

import sys

from tests.fuzz.command import main

sys.exit(main(sys.argv[1:]))
