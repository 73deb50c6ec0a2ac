"""`python -m gramophone_client` is the command `gramophone`."""

import sys

from gramophone_client.cli import main

if __name__ == "__main__":
    sys.exit(main())
