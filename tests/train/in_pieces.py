"""``ip2p`` under FSDP without a GPU: Accelerate shards only where it finds several, so it is told that it did."""

from __future__ import annotations

import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from ip2p_engine import cli

find = PartialState.__init__


def find_processes(state, *arguments, **settings):
    find(state, *arguments, **settings)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = find_processes
    sys.exit(cli.main(sys.argv[1:]))
