"""run_sft.py with a real FSDP2 or ZeRO-3 on CPUs: torchrun --nproc_per_node 2 tests/sharded_on_cpu.py RECIPE ...

accelerate 1.15 shards by FSDP only for the types of process groups that AcceleratorState.__init__ lists, and MULTI_CPU
is not among them, though fully_shard works on CPUs with gloo. Here such a group says that it is MULTI_GPU; all else,
the device and the backend too, is as it was. DeepSpeed needs to be told of the group, which on GPUs transformers does.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run_sft


def shard_on_cpus():
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import modeling_utils

    from sft import run

    set_up_state, load_for_training = PartialState.__init__, run.load_for_training

    def set_up_as_if_of_gpus(self, *args, **kwargs):
        fresh = PartialState._shared_state == {}
        set_up_state(self, *args, **kwargs)
        if fresh and self.distributed_type == DistributedType.MULTI_CPU:
            if any("training_args.deepspeed" in argument for argument in sys.argv):
                import deepspeed

                deepspeed.init_distributed(dist_backend="gloo")
            else:
                self.distributed_type = DistributedType.MULTI_GPU

    def load_and_tell(recipe):
        opened, safe_open = [], modeling_utils.safe_open
        modeling_utils.safe_open = lambda *args, **kwargs: opened.append(args) or safe_open(*args, **kwargs)
        model = load_for_training(recipe)
        modeling_utils.safe_open = safe_open
        print(f"process {os.environ['RANK']} has read {len(opened)} files of weights", flush=True)
        return model

    PartialState.__init__, run.load_for_training = set_up_as_if_of_gpus, load_and_tell


if __name__ == "__main__":
    run_sft.import_libraries()  # first, since it takes less time than the imports above by themselves
    shard_on_cpus()
    sys.exit(run_sft.main())
