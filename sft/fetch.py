"""`python -m sft.fetch`, as the README says it; sft/model/fetch.py does it."""

import sys

from sft.model.fetch import main

if __name__ == "__main__":
    sys.exit(main())
