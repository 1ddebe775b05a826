"""The commands of the README's first screen, timed on this machine as a newcomer would: whole
processes, from the shell's point of view, with the peak memory of each."""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOAD = "from mvdream import MVDream; MVDream.from_pretrained('weights/tiny')"
PROMPT = "a red robot wearing a blue hat"


def timed(name, command):
    """Run a command in a fresh process; print seconds and peak resident memory."""
    began = time.perf_counter()
    pid = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL).pid
    _, status, usage = os.wait4(pid, 0)
    print(f"{name:34s} {time.perf_counter() - began:7.1f} s {usage.ru_maxrss / 2**20:7.2f} GiB"
          + ("" if status == 0 else f"   FAILED with status {status}"), flush=True)


def main(argv):
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory() as folder:
        timed("import and load weights/tiny", ["-c", LOAD])
        timed("generate.py --views-only",
              ["generate.py", PROMPT, "--views-only", "--out", f"{folder}/a"])
        timed("generate.py, the whole command", ["generate.py", PROMPT, "--out", f"{folder}/b"])
