"""A server in a process that cannot import the compiled ops: `python -m tests.support.without_ops --engine fake`."""

import sys

if __name__ == "__main__":
    sys.modules["gramophone_server._C"] = None  # type: ignore[assignment]  # importing it raises ModuleNotFoundError
    from gramophone_server.command import main

    main()
