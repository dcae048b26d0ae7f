"""run_sft.py as a launcher starts it, and then what accelerate made of the process: launched.py REPORT ARGUMENTS..."""

import json
import sys
from pathlib import Path

import run_sft


def main() -> int:
    code = run_sft.main(sys.argv[2:])
    from accelerate.state import AcceleratorState

    state = AcceleratorState()  # the one that the trainer made
    plugin = getattr(state, "fsdp_plugin", None)
    found = {
        "distributed_type": state.distributed_type.value,
        "processes": state.num_processes,
        "device": str(state.device),
        "fsdp_version": plugin.fsdp_version if plugin else None,
    }
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
