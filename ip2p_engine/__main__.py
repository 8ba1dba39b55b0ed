"""``python -m ip2p_engine`` is ``ip2p``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
