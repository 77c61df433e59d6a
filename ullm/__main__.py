"""``python -m ullm`` is ``ullm``."""

import sys

from ullm.cli.early import main

if __name__ == "__main__":
    sys.exit(main())
