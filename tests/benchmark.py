"""Speed and quality, measured and printed; nothing here passes or fails.

    python tests/benchmark.py model      the networks at full size: steps, memory, loading
    python tests/benchmark.py nerf       the kernels and the fits
    python tests/benchmark.py sds        score distillation: time, memory, quality, ablations
    python tests/benchmark.py train      training: throughput, memory, the paper's comparisons
    python tests/benchmark.py quality    four views against ground truth, the table of the README
    python tests/benchmark.py pictures   the pictures of the README that teach
    python tests/benchmark.py cpu        the commands of the first screen on this machine

Options after the name go to that part: `python tests/benchmark.py quality --prompts 16`.
"""
import importlib
import sys
from pathlib import Path

PARTS = ("model", "nerf", "sds", "train", "quality", "pictures", "cpu")

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    if len(sys.argv) < 2 or sys.argv[1] not in PARTS:
        sys.exit(__doc__)
    importlib.import_module(f"benchmark_{sys.argv[1]}").main(sys.argv[2:])
