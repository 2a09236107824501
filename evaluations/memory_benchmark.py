"""The old name of the command `scripts/benchmark_memory.py`."""

from guided_diffusion.cli import run_renamed

if __name__ == "__main__":
    run_renamed("python -m evaluations.memory_benchmark", "benchmark_memory")
