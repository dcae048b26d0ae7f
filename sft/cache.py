"""`python -m sft.cache`, as the README says it; sft/data/cache.py does it."""

import sys

from sft.data.cache import main

if __name__ == "__main__":
    sys.exit(main())
