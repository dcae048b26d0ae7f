"""Where the time of a training step goes, by kind of work."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_checks.machine import ON_GPU, sync

# The first that is found in a kernel's name (on a CPU an operation's) is its kind; what is none of them is "other".
KINDS = {
    "dequantisation": r"dequant|quantize",
    "attention": r"flash|fmha|attention|softmax",
    "matrix products": r"gemm|gemv|nvjet|cutlass|xmma|cublas|aten::(mm|addmm|bmm|baddbmm|linear|matmul)\b|mkldnn",
    "loss": r"_loss|nll|entropy|logsumexp|lce|liger",
    "optimizer": r"adam|optimizer|multi_tensor|foreach",
    "copies and casts": r"memcpy|memset|copy|cat|aten::(to|_to_copy|clone|contiguous)\b",
    "elementwise": r"elementwise|vectorized|reduce|triton|norm|dropout|aten::(mul|add|silu|mean|rsqrt|neg|sum|pow)_?\b",
}


class Shares:
    """kinds: seconds by kind of work; names: by kernel; both as `share` of the wall time are what is printed."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.names: Counter[str] = Counter()


@contextmanager
def shares_of_work() -> Iterator[Shares]:
    """Measures what runs while it is open; the shares are there when it is closed."""
    shares = Shares()
    activity = ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        yield shares
        sync()
    for event in found.key_averages():
        on_gpu = event.device_type == DeviceType.CUDA
        seconds = (event.self_device_time_total if ON_GPU else event.self_cpu_time_total) / 1e6
        if on_gpu != ON_GPU or not seconds:
            continue
        kind = next((kind for kind, words in KINDS.items() if re.search(words, event.key, re.IGNORECASE)), "other")
        shares.kinds[kind] += seconds
        shares.names[event.key] += seconds
