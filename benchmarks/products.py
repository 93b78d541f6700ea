"""Speed of matrix products of an encoder's shape in fp32 and bf16, on one thread: which precision suits this machine.

python benchmarks/products.py
"""

import time

import torch

TOKENS, HIDDEN, INNER, REPEATS = 2048, 384, 1536, 20


def main() -> None:
    """Print GFLOP/s of CPU time for both, interleaved, and the ratio."""
    torch.set_num_threads(1)
    spent = dict.fromkeys((torch.float32, torch.bfloat16), 0.0)
    pairs = {
        dtype: (torch.randn(TOKENS, HIDDEN, dtype=dtype), torch.randn(HIDDEN, INNER, dtype=dtype)) for dtype in spent
    }
    for left, right in pairs.values():
        left @ right
    for _ in range(REPEATS):
        for dtype, (left, right) in pairs.items():
            began = time.process_time()
            left @ right
            spent[dtype] += time.process_time() - began
    rates = {dtype: 2 * TOKENS * HIDDEN * INNER * REPEATS / seconds / 1e9 for dtype, seconds in spent.items()}
    for dtype, rate in rates.items():
        print(f"{str(dtype).removeprefix('torch.'):<9} {rate:7.1f} GFLOP/s")
    print(f"fp32 / bf16 {rates[torch.float32] / rates[torch.bfloat16]:.1f}, {torch.backends.cpu.get_cpu_capability()}")


if __name__ == "__main__":
    main()
