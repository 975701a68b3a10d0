"""python -m tests.fuzz --minutes 60 | --only N | --from N --count M | --shrink N"""

import sys

from tests.fuzz.command import main

sys.exit(main(sys.argv[1:]))
