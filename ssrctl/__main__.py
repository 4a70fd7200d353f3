"""``python -m ssrctl`` is the same as ``ssrctl``."""

from ssrctl.cli import entry_point

if __name__ == "__main__":
    entry_point()
